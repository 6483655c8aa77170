"""SparseMixer-v2: gates and gradients of Hugging Face's Phi-3.5-MoE, what is drawn and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router
from sparse_experts.moe.routers.sparse_mixer import choose
from sparse_experts.moe.routing import as_pair
from tests.moe.golden_2026 import LOGIT_GTE, MASK_GT, PRINTED

LOGIT_E = jnp.array([2.0, 1.4, 1.5, -1.0])


def router(E=4, **fields):
  return make_router("sparse_mixer", 4, E, rngs=nnx.Rngs(0), **fields)


def by_round(routing, T=8):
  """(expert, gate) of each token and round, _TK."""
  return (np.asarray(a[0]).reshape(-1, T).T for a in (routing.expert, routing.gate))


def test_golden_evaluation():
  expert_TK, gate_TK = by_round(jax.jit(router(eps=0.2).route)(LOGIT_GTE, MASK_GT))
  expected = {0: ([0, 1], [1, 1]), 1: ([0, 1], [0.622459, 1]), 3: ([0, 2], [0.574443, 1]),
              5: ([2, 3], [1, 0.598688]), 6: ([1, 0], [0.524979, 1])}
  for token, (experts, gates) in expected.items():
    assert expert_TK[token].tolist() == experts
    np.testing.assert_allclose(gate_TK[token], gates, atol=PRINTED)
  _, gate_TK = by_round(jax.jit(router().route)(LOGIT_GTE, MASK_GT))
  np.testing.assert_array_equal(gate_TK, np.ones((8, 2)), "at the release's eps nothing else is near")


# drawn in each round, the uniform draw -> experts, gates, gradients of the gates
TRAINING = {
    "the best, twice": ([0, 2], 0.0, [0.463963, 0.524979],
                        [[0.248701, -0.118138, -0.130563, 0], [0, -0.249376, 0.249376, 0]]),
    "another, whole": ([1, 0], 0.76, [0.254629, 0.622459],
                       [[-0.118138, 0.189793, -0.071655, 0], [0.235004, 0, -0.235004, 0]]),
    "another, a third": ([1, 0], 0.74, [0.084868, 0.622459],
                         [[-0.118138, 0.189793, -0.071655, 0], [0.235004, 0, -0.235004, 0]]),
}


@pytest.mark.parametrize("drawn, uniform, gates, slopes", TRAINING.values(), ids=TRAINING)
def test_golden_training(drawn, uniform, gates, slopes):
  def in_rounds(logit_E):
    left_E, found = logit_E, []
    for expert in drawn:
      gumbel_E = 100.0 * jax.nn.one_hot(expert, 4)
      chosen, gate = choose(left_E[None, None], 0.2, gumbel_E[None, None], jnp.full((1, 1), uniform))
      found.append((chosen[0, 0], gate[0, 0]))
      left_E = left_E.at[expert].set(-jnp.inf)
    return tuple(jnp.stack(a) for a in zip(*found, strict=True))

  experts, found = in_rounds(LOGIT_E)
  assert experts.tolist() == drawn
  np.testing.assert_allclose(found, gates, atol=PRINTED)
  np.testing.assert_allclose(jax.jacobian(lambda l: in_rounds(l)[1])(LOGIT_E), slopes, atol=PRINTED)


def test_draws_follow_the_softmax_and_one_in_four_others_is_whole():
  """Of 20,000 tokens; five standard deviations are below 0.02."""
  T = 20_000
  logit_GTE = jnp.broadcast_to(LOGIT_E, (1, T, 4))
  routing = jax.jit(router(eps=0.2).route)(logit_GTE, jnp.ones((1, T), bool), jax.random.key(0))
  expert_TK, gate_TK = by_round(routing, T)
  first = np.bincount(expert_TK[:, 0], minlength=4) / T
  np.testing.assert_allclose(first, [0.463963, 0.254629, 0.281408, 0], atol=0.02)
  whole = np.isclose(gate_TK[expert_TK[:, 0] == 1, 0], 0.254629, atol=PRINTED)
  np.testing.assert_allclose(whole.mean(), 0.25, atol=0.04)  # of 5,000
  assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
  assert np.allclose(gate_TK[expert_TK[:, 0] == 0, 0], 0.463963, atol=PRINTED)


def test_the_rule_is_a_ratio_also_of_negative_logits():
  """-1 and -1.4 differ by .4 / 1.4 = .286, in the range at 2 eps = .3; -1.5 by .333, out of it."""
  logit_E = jnp.array([-1.0, -1.4, -1.5])
  pi = 1 / (1 + np.exp(-0.4))
  _, gate = choose(logit_E[None, None], 0.15)
  np.testing.assert_allclose(gate[0, 0], pi, atol=PRINTED)


def test_balance_is_of_the_batch_and_counts_both_rounds():
  routing = jax.jit(router().route)(LOGIT_GTE, MASK_GT)
  np.testing.assert_array_equal(routing.metrics["load"][0], [6, 4, 3, 3])
  np.testing.assert_allclose(as_pair(routing.losses["load_balance"]), (1.104322, 1), atol=PRINTED)
  halves = jax.jit(router().route)(LOGIT_GTE.reshape(2, 4, 4), MASK_GT.reshape(2, 4))
  np.testing.assert_allclose(as_pair(halves.losses["load_balance"]), (1.104322, 1), atol=PRINTED)


def test_jitter_is_of_training_only():
  made, x_GTD = router(jitter=0.5, eps=0.0), LOGIT_GTE
  made.w[...] = jnp.eye(4)
  quiet = made(x_GTD, Tokens(mask=MASK_GT), None)
  np.testing.assert_allclose(quiet.prob, jax.nn.softmax(LOGIT_GTE), rtol=1e-6)
  noisy = made(x_GTD, Tokens(mask=MASK_GT), None, jax.random.key(0))
  assert np.abs(noisy.prob - quiet.prob).max() > 0.05


@pytest.mark.parametrize("fields, message", [
    (dict(k=3), "router.k=3 is more than the two rounds that the paper has; choose 1 or 2"),
    (dict(k=0), "router.k=0 is not between 1 and num_experts=4"),
    (dict(E=1), "router.k=2 is not between 1 and num_experts=1"),
    (dict(eps=-0.1), "router.eps=-0.1 leaves no expert to choose; choose 0 or more"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
