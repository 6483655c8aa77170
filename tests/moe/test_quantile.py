"""Quantile balancing: biases of the originals' code, what counts, and sums that do not depend on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router
from tests.moe.golden_2026 import LOGIT_GTE, MASK_GT, PRINTED, TOP_2, sets, taken

OLD_E = [-0.1, 0.05, 0.02, 0.03]
RAW = dict(score="logit", estimator="exact")


def router(E=4, bias=None, **fields):
  made = make_router("quantile", 4, E, rngs=nnx.Rngs(0), **fields)
  if bias is not None:
    made.bias_E[...] = jnp.asarray(bias, jnp.float32)
  return made


def step(given, logit_GTE=LOGIT_GTE, mask_GT=None):
  """(routing, the bias after a step on these tokens)."""
  mask_GT = jnp.ones(logit_GTE.shape[:2], bool) if mask_GT is None else mask_GT
  graphdef, state = nnx.split(given)

  @jax.jit
  def run(state, logit_GTE, mask_GT):
    made = nnx.merge(graphdef, state)
    routing = made.route(logit_GTE, mask_GT)
    return routing, made.next_state({"bias_E": made.bias_E[...]}, {}, routing.metrics, routing.stats)

  routing, new = run(state, logit_GTE, mask_GT)
  return routing, np.asarray(new["bias_E"])


def logits(*scores_TE):
  score_GTE = np.array([scores_TE])
  return jnp.asarray(np.log(score_GTE / (1 - score_GTE)), jnp.float32)


def test_golden_raw_logits():
  """Megatron's, and that the same tokens are then nearly balanced."""
  bias = [0.3, -0.1, 0.2, -0.4]
  routing, new_E = step(router(bias=bias, **RAW))
  assert sets(routing) == ["01", "01", "01", "02", "02", "23", "01", "03"]
  np.testing.assert_allclose(new_E, [-0.825, 0.275, 0.575, -0.025], atol=PRINTED)
  np.testing.assert_array_equal(routing.metrics["load"][0], [7, 4, 3, 2])
  # One token then stands exactly at its cut, where rounding decides.
  np.testing.assert_allclose(step(router(bias=new_E, **RAW))[0].metrics["load"][0], [4, 4, 5, 3], atol=1)
  _, new_E = step(router(bias=bias, score="logit", estimator="marin"))
  np.testing.assert_allclose(new_E, [-1.125, -0.025, 0.875, 0.275], atol=PRINTED)


@pytest.mark.parametrize("estimator, groups, expected", [
    ("exact", 1, [-1.05, 0.35, 0.35, 0.35]),
    ("marin", 1, [-1.175, 0.125, 0.525, 0.525]),
    ("exact", 2, [-0.99375, -0.06875, 0.48125, 0.58125]),  # a mean of two is not the batch's
])
def test_golden_first_step_of_raw_logits(estimator, groups, expected):
  routing, new_E = step(router(score="logit", estimator=estimator), LOGIT_GTE.reshape(groups, -1, 4))
  np.testing.assert_allclose(new_E, expected, atol=PRINTED)
  if groups == 1:
    assert sets(routing) == TOP_2


COUNTS = ["0004301000", "0002231000", "0001241000", "0001232000"]


@pytest.mark.parametrize("fields, expected", [
    (dict(bins=10), [-0.192604, 0.022396, 0.076146, 0.094062]),
    (dict(), [-0.191888, 0.003763, 0.088688, 0.099438]),
    (dict(estimator="marin"), [-0.192268, 0.002436, 0.089916, 0.099916]),
    (dict(estimator="exact"), [-0.173980, 0.074660, 0.044660, 0.054660]),
])
def test_golden_sigmoids(fields, expected):
  """torchtitan's histogram and Megatron's rank."""
  routing, new_E = step(router(bias=OLD_E, **fields))
  np.testing.assert_allclose(new_E, expected, atol=PRINTED)
  if fields.get("bins") == 10:
    counted = ["".join(map(str, row)) for row in routing.stats["required_bias"].tolist()]
    assert counted == COUNTS


def test_golden_first_step_of_sigmoids():
  """Biases of 0 lie on a bin's edge, where float32 may be one bin of 0.002 off; the original was too."""
  np.testing.assert_allclose(step(router(bins=10))[1], [-0.2125, 0.0375, 0.0875, 0.0875], atol=PRINTED)
  np.testing.assert_allclose(step(router())[1], [-0.187, -0.001, 0.094, 0.094], atol=0.002 + PRINTED)


@pytest.mark.parametrize("first, second, expected", [
    (4, 0, [-0.5, -0.1, 0.1, 0.5]), (0, 4, [0.5, 0.1, -0.5, -0.1]), (4, 4, [-0.2, 0.2, -0.2, 0.2])])
def test_golden_sums_of_two_batches_are_not_their_mean(first, second, expected):
  """torchtitan's own test."""
  logit_GTE = logits(*[[0.92, 0.68, 0.31, 0.07]] * first, *[[0.07, 0.31, 0.92, 0.68]] * second)
  np.testing.assert_allclose(step(router(k=1, bins=10), logit_GTE)[1], expected, atol=PRINTED)


def test_golden_two_experts():
  """All tokens want expert 0; afterwards one has moved and one stands exactly at its cut."""
  logit_GTE = logits([0.9, 0.5], [0.8, 0.7], [0.7, 0.2], [0.6, 0.45])
  routing, new_E = step(router(2, k=1, estimator="exact"), logit_GTE)
  np.testing.assert_array_equal(routing.metrics["load"][0], [4, 0])
  np.testing.assert_allclose(new_E, [-0.075, 0.075], atol=PRINTED)  # beta = (.15, 0)
  # Expert 1 is above expert 0 by -.25, .05, -.35 and, up to rounding, 0.
  margin = np.array([0.5, 0.7, 0.2, 0.45]) - [0.9, 0.8, 0.7, 0.6] + new_E[1] - new_E[0]
  np.testing.assert_allclose(margin, [-0.25, 0.05, -0.35, 0], atol=PRINTED)


@pytest.mark.parametrize("k, n", [(2, 8), (1, 7), (3, 10)])
def test_the_histogram_is_the_quantile_up_to_a_bin(k, n):
  """Against the sorted values, also where n k / E is no whole number."""
  logit_GTE = jax.random.normal(jax.random.key(n), (3, n, 4))
  given = router(k=k, bias=OLD_E)
  _, new_E = step(given, logit_GTE)
  score_TE = np.asarray(jax.nn.sigmoid(logit_GTE), np.float64).reshape(-1, 4)
  alpha_T = np.sort(score_TE + OLD_E, axis=-1)[:, ::-1][:, k]
  sorted_TE = np.sort(alpha_T[:, None] - score_TE, axis=0)
  rank = -(-len(score_TE) * k // 4)
  expected_E = sorted_TE[rank - 1]
  assert np.abs((new_E - new_E[0]) - (expected_E - expected_E[0])).max() < 2 * (2.15 / 1000)


def test_gates_are_scores_without_bias():
  routing, _ = step(router(bias=[0, 0, 9.0, 0], scale=2.5))
  gate_TE, goes_TE = taken(routing)
  assert goes_TE[:, 2].all()
  score_TE = np.where(goes_TE, 1 / (1 + np.exp(-np.asarray(LOGIT_GTE[0], np.float64))), 0)
  np.testing.assert_allclose(gate_TE, 2.5 * score_TE / score_TE.sum(-1, keepdims=True), rtol=1e-5)
  z = np.log(np.exp(np.asarray(LOGIT_GTE[0], np.float64)).sum(-1)) ** 2
  np.testing.assert_allclose(routing.losses["z"][0], z.mean(), rtol=1e-5)


def test_no_gradient_reaches_the_bias():
  graphdef, state = nnx.split(router(bias=OLD_E))
  route = lambda state: nnx.merge(graphdef, state).route(LOGIT_GTE, MASK_GT)
  total = lambda state: (route(state).gate * jnp.arange(16.0)[None]).sum()
  assert not jax.jit(jax.grad(total))(state)["bias_E"][...].any()


@pytest.mark.parametrize("estimator", ["histogram", "exact", "marin"])
def test_padding_is_not_counted(estimator):
  """Half of each group, and a group of padding; a step of padding alone keeps the bias."""
  given = router(bias=OLD_E, estimator=estimator)
  noise_GTE = 3 * jax.random.normal(jax.random.key(0), LOGIT_GTE.shape)
  padded_GTE = jnp.concatenate([jnp.concatenate([LOGIT_GTE, noise_GTE], 1)] * 2)
  mask_GT = jnp.stack([jnp.arange(16) < 8, jnp.zeros(16, bool)])
  np.testing.assert_allclose(step(given, padded_GTE, mask_GT)[1], step(given)[1], atol=1e-7)
  np.testing.assert_allclose(step(given, padded_GTE, mask_GT & False)[1], OLD_E, atol=1e-7)


def test_an_average_with_the_old_bias():
  _, replaced_E = step(router(bias=OLD_E))
  _, new_E = step(router(bias=OLD_E, ema=0.75))
  np.testing.assert_allclose(new_E, 0.75 * np.array(OLD_E) + 0.25 * replaced_E, atol=1e-6)


def test_loads_become_even():
  """A router that prefers experts 0 and 1, its weights held, in three steps."""
  logit_GTE = jax.random.normal(jax.random.key(0), (4, 512, 4)) + jnp.array([[[2.0, 1.0, 0.0, -1.0]]])
  most, bias_E = [], None
  for _ in range(4):
    routing, bias_E = step(router(bias=bias_E), logit_GTE)
    most.append(float(routing.metrics["load"][0].max()))
  assert most[0] > 1.5 * 1024 and most[-1] < 1.1 * 1024


@pytest.mark.parametrize("groups", [8, 16])
def test_any_mesh_and_any_groups_count_alike(groups):
  """Every count, and so the bias, on one device and on 2x4; in groups of 16 and of 8."""
  x_GTD = jax.random.normal(jax.random.key(1), (8, 16, 4))
  mask_GT = jax.random.bernoulli(jax.random.key(2), 0.8, (8, 16))
  given = router(bias=OLD_E)
  given.w[...] = jax.random.normal(jax.random.key(3), (4, 4))
  graphdef, state = nnx.split(given)

  def run(x_GTD, mask_GT):
    made = nnx.merge(graphdef, state)
    routing = made(x_GTD, Tokens(mask=mask_GT), None)
    return routing.stats, made.next_state({"bias_E": made.bias_E[...]}, {}, routing.metrics, routing.stats)

  stats, new = jax.jit(run)(x_GTD, mask_GT)
  cut = (x_GTD.reshape(groups, -1, 4), mask_GT.reshape(groups, -1))
  mesh = partitioning.make_mesh(2, 4)
  with partitioning.use(mesh):
    program = jax.jit(run).lower(*jax.device_put(cut, partitioning.batch_sharding(mesh))).compile()
    spread_stats, spread = program(*jax.device_put(cut, partitioning.batch_sharding(mesh)))
  assert "all-gather" not in program.as_text(), "counts travel, not tokens"
  np.testing.assert_array_equal(spread_stats["required_bias"], stats["required_bias"])
  np.testing.assert_allclose(spread["bias_E"], new["bias_E"], atol=1e-6)


@pytest.mark.parametrize("fields, message", [
    (dict(k=5), "router.k=5 is not between 1 and num_experts=4"),
    (dict(k=4), "router.k=4 leaves no expert of num_experts=4 to compare with; lower k or add experts"),
    (dict(score="softmax"), "router.score='softmax' is unknown"),
    (dict(estimator="mean"), "router.estimator='mean' is unknown"),
    (dict(score="logit"), "router.score='logit' has no range for router.estimator='histogram'; choose"),
    (dict(bins=0), "router.bins=0 leaves nothing to count in; choose 1 or more"),
    (dict(ema=1.0), "router.ema=1.0 is out of range; choose from 0 to below 1"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
