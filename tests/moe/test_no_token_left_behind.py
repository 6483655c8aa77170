"""Rerouting of overflow: the golden toy, the rounds as loops, and that a layer keeps what the router kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, MoELayer, Tokens, make_router
from tests.moe.test_routers import LOGIT_GTE, MASK_GT, PRINTED
from tests.oracle import softmax

T, D, E = 24, 5, 4


def router(num_experts=E, **fields):
  return make_router("no_token_left_behind", D, num_experts, rngs=nnx.Rngs(0), **fields)


def as_loops(prob_TE, mask_T, capacity, rounds):
  """(expert, kept) of each token: first choices in order, then, round by round, who is left."""
  used, expert, kept = [0] * prob_TE.shape[1], {}, set()
  for t in np.flatnonzero(mask_T):
    expert[t] = e = int(prob_TE[t].argmax())
    if used[e] < capacity:
      used[e] += 1
      kept.add(t)
  for _ in range(rounds):
    free = [e for e in range(len(used)) if used[e] < capacity]  # as the round begins
    for t in sorted(set(expert) - kept):
      wish = max(free, key=lambda e: prob_TE[t][e], default=None)
      if wish is not None and used[wish] < capacity:
        expert[t], used[wish] = wish, used[wish] + 1
        kept.add(t)
  return expert, kept


def test_golden_overflow_goes_to_the_next_best_with_room():
  """Two slots: tokens 3 and 5 find expert 0 full; 1 and 2 have a place each. With one slot nobody has."""
  route = lambda capacity: router(3).route(LOGIT_GTE, MASK_GT, capacity=capacity)
  sent = route(2)
  assert sent.expert.tolist() == [[0, 2, 0, 1, 1, 2]]
  np.testing.assert_allclose(
      sent.gate[0], [0.687131, 0.665241, 0.667481, 0.331499, 0.546549, 0.170953], atol=PRINTED)
  np.testing.assert_array_equal(sent.metrics["load"][0], [2, 2, 2])
  np.testing.assert_allclose(sent.losses["load_balance"], (1.310886, 1), atol=PRINTED)  # of first choices
  assert route(1).expert.tolist() == route(None).expert.tolist() == [[0, 2, 0, 0, 1, 0]]


@pytest.mark.parametrize("rounds, dropped", [(1, True), (3, False)])
def test_a_layer_keeps_what_the_router_sent(rounds, dropped):
  """The loops, the router's experts and gates, and the layer's `kept` agree; 24 real tokens, 6 slots each."""
  given = router(rounds=rounds)
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
    expert, kept = as_loops(prob_TE, mask_GT[g], 6, rounds)
    assert {int(t) for t in np.flatnonzero(routing.kept[g])} == {int(t) for t in kept}
    for t, e in expert.items():
      assert routing.expert[g, t] == e
      np.testing.assert_allclose(routing.gate[g, t], prob_TE[t, e], rtol=1e-5)
      moved += e != prob_TE[t].argmax()
  assert moved > 10


def test_mistakes_are_named():
  with pytest.raises(UserError, match="router.rounds=0 reroutes nothing; choose 1 or more, or"):
    router(rounds=0)
