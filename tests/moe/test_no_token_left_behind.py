"""Rerouting of overflow: the golden toy, the stages as loops, and that a layer keeps what the router kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, MoELayer, Tokens, make_router
from sparse_experts.moe.routing import slots
from tests.moe.test_routers import PRINTED
from tests.oracle import softmax

T, D, E = 24, 5, 4
TOY_GTE = jnp.array([[
    [2.0, 0.5, -1.0, 0.1], [1.6, 1.1, 0.2, -0.7], [0.3, 1.9, -0.4, 0.8], [1.2, -0.6, 0.9, -1.5],
    [2.4, 0.7, 1.3, 0.4], [-0.2, 0.6, 1.7, 1.0], [1.4, 1.5, -0.9, -0.3], [0.9, -1.2, 0.05, 2.2]]])


def router(**fields):
  return make_router("no_token_left_behind", D, E, rngs=nnx.Rngs(0), **fields)


def as_loops(prob_TE, mask_T, capacity, choices):
  """(expert, kept) of each token: stage by stage, each token without a slot asks, whoever is full."""
  used, expert, kept = [0] * prob_TE.shape[1], {}, set()
  for i in range(choices):
    for t in np.flatnonzero(mask_T):
      if t not in kept:
        e = int(np.argsort(-prob_TE[t])[i])
        expert.setdefault(t, e)
        if used[e] < capacity:
          expert[t], used[e] = e, used[e] + 1
          kept.add(t)
  return expert, kept


@pytest.mark.parametrize("choices, loss, expert, dropped", [
    (4, 1.0, [0, 0, 1, 2, 3, 2, 1, 3], []),
    (2, 1.104322, None, [4]),
    (1, 1.208644, None, [3, 4]),
])
def test_golden_stages(choices, loss, expert, dropped):
  """Mesh's stages on eight tokens, two slots: token 4 asks three full experts before the last takes it."""
  sent = router(choices=choices).route(TOY_GTE, jnp.ones((1, 8), bool), capacity=2)
  np.testing.assert_allclose(sent.losses["load_balance"], (loss, 1), rtol=2e-6)
  slot_GA = slots(sent.expert, sent.valid, E)
  assert np.flatnonzero(slot_GA[0] >= 2).tolist() == dropped
  if expert:
    assert sent.expert.tolist() == [expert]
    np.testing.assert_allclose(sent.gate[0], [
        0.702995, 0.511931, 0.611611, 0.375417, 0.081977, 0.505299, 0.462780, 0.703042], atol=PRINTED)
    np.testing.assert_array_equal(sent.metrics["load"][0], [2, 2, 2, 2])


def test_the_balance_loss_teaches_nothing_if_every_expert_is_a_choice():
  loss = lambda logit, choices: router(choices=choices).route(
      logit, jnp.ones((1, 8), bool), capacity=2).losses["load_balance"][0]
  assert np.abs(jax.grad(loss)(TOY_GTE, 4)).max() < 1e-7 < 1e-3 < np.abs(jax.grad(loss)(TOY_GTE, 3)).max()


@pytest.mark.parametrize("choices, dropped", [(2, True), (4, False)])
def test_a_layer_keeps_what_the_router_sent(choices, dropped):
  """The loops, the router's experts and gates, and the layer's `kept` agree; 24 real tokens, 6 slots each."""
  given = router(choices=choices)
  given.w[...] = jax.random.normal(jax.random.key(1), (D, E)) + jnp.array([[2.0, 1.0, 0.0, 0.0]])
  layer = MoELayer(given, Experts(E, D, 3, "relu", rngs=nnx.Rngs(0)), "scatter", capacity_factor=1.0,
                   capacity_rule="megablocks")
  x_GTD = jax.random.normal(jax.random.key(0), (6, T, D)) + 0.5
  mask_GT = np.ones((6, T), bool)
  mask_GT[1, :5] = mask_GT[2, 7:12] = False
  call = jax.jit(lambda x: layer(x, Tokens(mask=jnp.asarray(mask_GT))),
                 compiler_options={"xla_backend_optimization_level": 0})
  routing = call(x_GTD)[1]
  assert any(not kept.all() for kept in np.asarray(routing.kept | ~mask_GT)) == dropped
  moved = 0
  for g in range(6):
    prob_TE = np.array([softmax(row) for row in np.asarray(x_GTD[g] @ given.w[...], np.float64)])
    expert, kept = as_loops(prob_TE, mask_GT[g], 6, choices)
    assert {int(t) for t in np.flatnonzero(routing.kept[g])} == {int(t) for t in kept}
    for t, e in expert.items():
      assert routing.expert[g, t] == e
      np.testing.assert_allclose(routing.gate[g, t], prob_TE[t, e], rtol=1e-5)
      moved += e != prob_TE[t].argmax()
  assert moved > 10


def test_mistakes_are_named():
  with pytest.raises(UserError, match="router.choices=0 asks no expert; choose 1 or more"):
    router(choices=0)
