"""DeepSeek-V3: the golden toy, a bias that chooses and does not weigh, nodes, the loss of each sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import make_router
from sparse_experts.moe.routing import losses
from tests.moe.test_routers import LOGIT_GTE, MASK_GT, PRINTED


def router(E=3, bias=None, **fields):
  made = make_router("deepseek_v3", 4, E, rngs=nnx.Rngs(0), **fields)
  if bias is not None:
    made.bias_E[...] = jnp.asarray(bias, jnp.float32)
  return made


def route(logit_GTE=LOGIT_GTE, mask_GT=MASK_GT, sequence_GT=None, **fields):
  return jax.jit(router(logit_GTE.shape[-1], **fields).route)(logit_GTE, mask_GT, sequence_GT)


def dense(routing, E):
  gate_TE = np.zeros((routing.token.max() + 1, E))
  gate_TE[routing.token[0], routing.expert[0]] = routing.gate[0]
  return gate_TE


def test_golden_choices_and_gates():
  routing = route(bias=[0, 0.5, 0])
  assert routing.expert[0].reshape(2, 6).T.tolist() == [[1, 0], [1, 2], [1, 0], [1, 0], [1, 0], [1, 0]]
  gate_TE = dense(routing, 3)
  np.testing.assert_allclose(gate_TE[0], [1.373188, 1.126812, 0], atol=PRINTED)
  np.testing.assert_allclose(gate_TE[1], [0, 0.905274, 1.594726], atol=PRINTED)


def test_a_bias_moves_gates_only_through_the_choice():
  """Gates are the same bits after an update that leaves each token's set; a large one changes sets."""
  first = router()
  plain, metrics = route(), {"load": (jnp.array([6.0, 4.0, 2.0]), jnp.array(6.0))}
  state = first.next_state({"bias_E": first.bias_E[...]}, {}, metrics, {})
  np.testing.assert_allclose(state["bias_E"], [-1e-3, 0, 1e-3], rtol=1e-6)
  np.testing.assert_array_equal(dense(route(bias=state["bias_E"]), 3), dense(plain, 3))
  assert (dense(route(bias=[0, 0, 9.0]), 3) > 0)[:, 2].all()


def test_biases_even_out_the_load_without_a_gradient():
  """A router that prefers experts 0 and 1, its weights held."""
  logit_GTE = jax.random.normal(jax.random.key(0), (1, 512, 4)) + jnp.array([[[2.0, 1.0, 0.0, -1.0]]])
  given = router(4, bias_rate=0.02)
  graphdef, state = nnx.split(given)
  mask_GT = jnp.ones((1, 512), bool)

  look = jax.jit(lambda state: nnx.merge(graphdef, state).route(logit_GTE, mask_GT).metrics)
  most = []
  for _ in range(60):
    metrics = look(state)
    most.append(metrics["load"][0].max())
    state["bias_E"][...] = given.next_state({"bias_E": state["bias_E"][...]}, {}, metrics, {})["bias_E"]
  assert most[0] > 1.5 * 256 and most[-1] < 1.15 * 256


def test_no_gradient_reaches_the_bias():
  graphdef, state = nnx.split(router())

  def total(state):
    routing = nnx.merge(graphdef, state).route(LOGIT_GTE, MASK_GT)
    return (routing.gate * jnp.arange(12.0)[None]).sum() + routing.losses["sequence_balance"][0]

  assert not jax.jit(jax.grad(total))(state)["bias_E"][...].any()


def reference_choice(biased_E, nodes, nodes_per_token, k):
  by_node = biased_E.reshape(nodes, -1)
  best = np.argsort(-np.sort(by_node, axis=-1)[:, -2:].sum(-1), kind="stable")[:nodes_per_token]
  allowed = [e for e in range(len(biased_E)) if e // by_node.shape[1] in best]
  return set(sorted(allowed, key=lambda e: -biased_E[e])[:k])


@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["", "negative"])
def test_experts_are_on_the_best_nodes(shift):
  """Also where all biased scores are negative, which zeros in place of the excluded would beat."""
  E, fields = 12, dict(nodes=4, nodes_per_token=2, k=3)
  logit_GTE = jax.random.normal(jax.random.key(1), (1, 64, E))
  bias_E = np.random.default_rng(0).normal(size=E).astype(np.float32) * 0.1 + shift
  routing = route(logit_GTE, jnp.ones((1, 64), bool), bias=bias_E, **fields)
  found = np.asarray(routing.expert[0]).reshape(3, 64).T
  biased_TE = np.asarray(jax.nn.sigmoid(logit_GTE[0])) + bias_E
  free = np.argsort(-biased_TE, axis=-1)[:, :3]
  assert any(set(a) != set(b) for a, b in zip(found.tolist(), free.tolist(), strict=True))
  for chosen, biased_E in zip(found.tolist(), biased_TE, strict=True):
    assert set(chosen) == reference_choice(biased_E, **fields)


def test_balance_is_of_each_sequence():
  """Two sequences of a group, three and two tokens, and padding; each as its formula says."""
  sequence_GT = jnp.array([[5, 5, 5, 8, 8, 8]])
  mask_GT = MASK_GT.at[0, 3].set(False)
  routing = route(sequence_GT=sequence_GT, mask_GT=mask_GT)
  prob_TE = np.asarray(jax.nn.sigmoid(LOGIT_GTE[0]))
  prob_TE = prob_TE / prob_TE.sum(-1, keepdims=True)
  expected = 0.0
  for tokens in ([0, 1, 2], [4, 5]):
    f_E = 3 / (2 * len(tokens)) * (dense(routing, 3)[tokens] > 0).sum(0)
    expected += (f_E * prob_TE[tokens].mean(0)).sum()
  np.testing.assert_allclose(routing.losses["sequence_balance"], (expected, 2), rtol=1e-5)


def test_one_sequence_a_group_is_the_balance_of_groups():
  routing = route()
  count_GE = routing.metrics["load"][0][None]
  np.testing.assert_allclose(
      routing.losses["sequence_balance"], losses.load_balance(routing.prob, count_GE, MASK_GT), rtol=1e-5)


@pytest.mark.parametrize("fields, message", [
    (dict(k=5), "router.k=5 is not between 1 and num_experts=4"),
    (dict(nodes=3), "router.nodes=3 does not divide num_experts=4 into nodes of 2 or more; choose a divisor"),
    (dict(nodes=4), "router.nodes=4 does not divide num_experts=4 into nodes of 2 or more; choose a divisor"),
    (dict(nodes=0), "router.nodes=0 does not divide"),
    (dict(nodes=2, nodes_per_token=3), "router.nodes_per_token=3 is not between 1 and router.nodes=2"),
    (dict(nodes=2, k=3), "router.k=3 is more than the 2 experts on a token's nodes; lower k or raise"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(4, **fields)
