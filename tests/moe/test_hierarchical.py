"""Shazeer et al. 2017, two levels: one branch is the flat router, and the losses as the paper's sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

from sparse_experts.errors import UserError
from sparse_experts.moe import make_router
from sparse_experts.moe.routing import as_pair
from tests.moe.test_routers import LOGIT_GTE, MASK_GT, PRINTED
from tests.oracle import softmax

T, I, J = 7, 3, 4
QUICK = {"xla_backend_optimization_level": 0}


def router(E=I * J, **fields):
  return make_router("hierarchical", 4, E, rngs=nnx.Rngs(0), **fields)


def draw(*shape, key=0):
  return jax.random.normal(jax.random.key(key), shape)


def test_one_branch_is_noisy_top_k():
  """Its gate is 1 and every token goes there; with noise and the golden values without."""
  std_GTE, noise_GTE = jnp.abs(draw(1, 6, 3)) + 0.3, draw(1, 6, 3, key=1)
  given = router(3, k=2, branches=1, branches_per_token=1)
  one = draw(1, 6, 1, key=2)
  one_level = make_router("noisy_top_k", 4, 3, k=2, rngs=nnx.Rngs(0))
  flat, found, plain = jax.jit(lambda: (
      one_level.route(LOGIT_GTE, MASK_GT, std_GTE, noise_GTE),
      given.route((one, LOGIT_GTE), MASK_GT, (one, std_GTE), (one, noise_GTE)),
      given.route((one, LOGIT_GTE), MASK_GT)), compiler_options=QUICK)()
  np.testing.assert_array_equal(found.expert, flat.expert)
  for name, loss in found.losses.items():
    np.testing.assert_allclose(as_pair(loss), as_pair(flat.losses[name]), rtol=1e-6)
  np.testing.assert_allclose(found.gate, flat.gate, rtol=1e-6)
  np.testing.assert_allclose(found.prob, flat.prob, rtol=1e-6)
  np.testing.assert_allclose(as_pair(plain.losses["importance"]), (0.329143, 1), atol=PRINTED)


def chances(clean, std, noisy, k):
  """P(each is among the k largest if its own noise is drawn again)."""
  found = []
  for i in range(len(clean)):
    threshold = sorted(np.delete(noisy, i))[-k]
    found.append(norm.cdf((clean[i] - threshold) / std[i]))
  return np.array(found)


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_gates_and_losses_as_the_papers_sums(scope):
  """Loops over tokens, 2 of 3 branches, 2 of 4 experts each; padding, and a branch nobody takes."""
  shapes = ((2, T, I), (2, T, I * J))
  logits, stds, noises = ([draw(*s, key=10 * i + j) for j, s in enumerate(shapes)] for i in range(3))
  stds = [jnp.abs(s) + 0.3 for s in stds]
  logits[0] = logits[0].at[1, :, 2].set(-20.0).at[0, :, 0].add(2.0)
  mask_GT = np.ones((2, T), bool)
  mask_GT[0, 2] = mask_GT[1, -3:] = False
  given = router(k=4, branches=I, branches_per_token=2, scope=scope)
  routing = jax.jit(given.route, compiler_options=QUICK)(
      tuple(logits), jnp.asarray(mask_GT), tuple(stds), tuple(noises))
  variation = lambda v: v.var() / v.mean() ** 2
  sums = []  # per group: importance, Load(i), Load_i(j), n_i
  for g in range(2):
    clean, std, noise = ([np.asarray(a[g], np.float64) for a in pair] for pair in (logits, stds, noises))
    importance_IJ, load_I, load_IJ, went_I = np.zeros((I, J)), np.zeros(I), np.zeros((I, J)), np.zeros(I)
    for t in range(T):
      first = clean[0][t] + std[0][t] * noise[0][t]
      branches = np.argsort(-first)[:2]
      expected = {}
      for i in branches:
        mine = slice(i * J, (i + 1) * J)
        second = (clean[1] + std[1] * noise[1])[t, mine]
        experts = np.argsort(-second)[:2]
        for j, gate in zip(experts, softmax(second[experts]), strict=True):
          expected[i * J + j] = softmax(first[branches])[list(branches).index(i)] * gate
        if mask_GT[g, t]:
          load_IJ[i] += chances(clean[1][t, mine], std[1][t, mine], second, 2)
          went_I[i] += 1
      listed = np.asarray(routing.token[g]) == t
      chosen, gates = np.asarray(routing.expert[g])[listed], np.asarray(routing.gate[g])[listed]
      assert (np.diff(gates) <= 0).all() and set(chosen.tolist()) == set(map(int, expected))
      np.testing.assert_allclose(gates, [expected[e] for e in chosen], rtol=1e-4)
      if mask_GT[g, t]:
        load_I += chances(clean[0][t], std[0][t], first, 2)
        np.add.at(importance_IJ.reshape(-1), chosen, gates)
    assert (went_I == 0).any() == (g == 1) and len(set(went_I)) > 1
    sums.append((importance_IJ, load_I, load_IJ, went_I))
  if scope == "batch":
    sums = [tuple(map(sum, zip(*sums, strict=True)))]
  load = sum(variation(load_I[:, None] * load_IJ / np.maximum(n_I, 1)[:, None])
             for _, load_I, load_IJ, n_I in sums)
  importance = sum(variation(importance_IJ) for importance_IJ, *_ in sums)
  found = {name: as_pair(loss) for name, loss in routing.losses.items()}
  np.testing.assert_allclose(found["importance"], (importance, len(sums)), rtol=1e-4)
  np.testing.assert_allclose(found["load_loss"], (load, len(sums)), rtol=1e-4)
  np.testing.assert_allclose(routing.prob.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("fields, message", [
    (dict(branches=5), "router.branches=5 does not divide num_experts=12; choose a divisor"),
    (dict(branches_per_token=5), "router.branches_per_token=5 is not between 1 and router.branches=4"),
    (dict(k=3), "router.k=3 does not take 1 to 3 experts from each of router.branches_per_token=2"),
    (dict(k=8), "router.k=8 does not take 1 to 3 experts from each"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
