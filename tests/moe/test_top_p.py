"""Top-p: the sets of the authors' code, the threshold's edge, both losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import make_router
from tests.moe.golden_2026 import LOGIT_GTE, MASK_GT, PRINTED, TOP_2, sets, taken


def router(E=4, **fields):
  return make_router("top_p", 4, E, rngs=nnx.Rngs(0), **fields)


def route(logit_GTE=LOGIT_GTE, mask_GT=MASK_GT, **fields):
  return jax.jit(router(logit_GTE.shape[-1], **fields).route)(logit_GTE, mask_GT)


@pytest.mark.parametrize("threshold, expected", [
    (0.4, ["0", "0", "1", "0", "0", "2", "1", "3"]),
    (0.7, ["0", "01", "13", "02", "02", "23", "01", "3"]),
    (0.75, TOP_2),
    (0.0, ["0", "0", "1", "0", "0", "2", "1", "3"]),  # at least one
    (1.0, ["0123"] * 8),
])
def test_golden_sets(threshold, expected):
  routing = route(threshold=threshold)
  assert sets(routing) == expected
  gate_TE, goes_TE = taken(routing)
  np.testing.assert_array_equal(gate_TE, np.where(goes_TE, routing.prob[0], 0), "gates are raw")
  np.testing.assert_allclose(routing.metrics["experts_per_token"][0], len("".join(expected)))


def test_golden_entropy():
  routing = route()
  np.testing.assert_allclose(routing.losses["token_entropy"][0] / 8, 1.033938, atol=PRINTED)
  alone = route(mask_GT=MASK_GT & (jnp.arange(8)[None] == 0))
  np.testing.assert_allclose(alone.losses["token_entropy"], (0.892472, 1), atol=PRINTED)


def test_the_expert_that_passes_the_threshold_is_taken():
  """.4, .3, .3: at a sum of exactly .4 one more is needed; the nucleus of sampling would have none."""
  logit_GTE = jnp.log(jnp.array([[[0.4, 0.3, 0.3]]]))
  exactly = float(jax.nn.softmax(logit_GTE)[0, 0, 0])
  count = lambda threshold: int(route(logit_GTE, MASK_GT[:, :1], threshold=threshold).valid.sum())
  assert [count(t) for t in (0.39, exactly, 0.69)] == [1, 2, 2]


def test_balance_counts_every_expert_of_a_token():
  """E Σ f P by hand at .7, of the 14 assignments of the golden sets: 5 3 3 3."""
  routing = route(threshold=0.7)
  mean_E = np.asarray(routing.prob[0], np.float64).mean(0)
  expected = 4 * (np.array([5, 3, 3, 3]) / 14 * mean_E).sum()
  np.testing.assert_array_equal(routing.metrics["load"][0], [5, 3, 3, 3])
  np.testing.assert_allclose(routing.losses["load_balance"], (expected, 1), rtol=1e-6)


@pytest.mark.parametrize("fields, message", [
    (dict(threshold=1.5), "router.threshold=1.5 is no sum of probabilities; choose from 0 to 1"),
    (dict(threshold=-0.1), "router.threshold=-0.1 is no sum of probabilities"),
    (dict(scope="all"), "router.scope='all' is unknown"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
