"""Expert threshold: cuts and choices of the authors' code, bounds while training, evaluation without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import make_router
from tests.moe.golden_2026 import LOGIT_GTE, MASK_GT, PRINTED, swiglu, taken

FREE = dict(warmup_steps=0, slack=4.0)
SECOND_GTE = 0.5 * LOGIT_GTE[:, ::-1] + 0.1


def router(cut=None, **fields):
  made = make_router("expert_threshold", 4, 4, rngs=nnx.Rngs(0), **fields)
  if cut is not None:
    made.cut_E[...] = jnp.asarray(cut, jnp.float32)
  return made


def route(given, logit_GTE=LOGIT_GTE, mask_GT=MASK_GT, training=True):
  return jax.jit(lambda logit_GTE, mask_GT: given.route(logit_GTE, mask_GT, training=training))(
      logit_GTE, mask_GT)


def by_expert(routing):
  return [np.flatnonzero(goes_T).tolist() for goes_T in taken(routing)[1].T]


def step(given, routing):
  """The router after a step that saw this routing."""
  state = nnx.to_pure_dict(nnx.state(given, nnx.filterlib.Not(nnx.Param)))
  nnx.update(given, given.next_state(state, {}, routing.metrics, routing.stats))
  return given


def test_golden_two_steps():
  """One of expert choice, then one by the cuts."""
  given = router(decay=0.99, warmup_steps=1, slack=4.0)
  first = route(given)
  assert by_expert(first) == [[0, 4], [2, 6], [4, 5], [5, 7]]
  step(given, first)
  np.testing.assert_allclose(given.cut_E[...], [2.0, 1.5, 1.3, 1.0], atol=PRINTED)
  second = route(given, SECOND_GTE)
  assert by_expert(second) == [[], [], [], [0]]
  step(given, second)
  np.testing.assert_allclose(given.cut_E[...], [1.547739, 1.173367, 1.023618, 0.798995], atol=PRINTED)
  assert given.steps[...] == 2


def test_golden_bounds():
  """Above the cuts are 8, 0, 0 and 5 tokens; of 1 to 3 each expert takes these."""
  given, cuts = dict(warmup_steps=0), [-5.0, 9.0, 9.0, 0.0]
  assert by_expert(route(router(cuts, **given))) == [[0, 1, 4], [2], [5], [2, 5, 7]]
  assert [len(tokens) for tokens in by_expert(route(router(cuts, **FREE)))] == [8, 0, 0, 5]
  evaluated = route(router(cuts, **given), training=False)
  assert [len(tokens) for tokens in by_expert(evaluated)] == [8, 0, 0, 5], "evaluation has no bounds"


def test_golden_output():
  """Token 0 is exactly at the cut of expert 0, and token 3 has no expert."""
  routing = route(router([2.0, 1.5, 1.3, 1.0]), training=False)
  gate_TE, goes_TE = taken(routing)
  y_TD = np.einsum("te,etd->td", gate_TE, swiglu(np.asarray(LOGIT_GTE[0], np.float64))[:4])
  np.testing.assert_allclose(y_TD[0], [0.064336, 0.154492, -0.115834, -0.025678], atol=PRINTED)
  assert goes_TE[0].tolist() == [True, False, False, False] and not goes_TE[3].any() and not y_TD[3].any()


def test_evaluation_goes_by_the_cuts_from_the_start():
  """In the warm-up, too: there 0, so half of the experts."""
  _, goes_TE = taken(route(router(), training=False))
  np.testing.assert_array_equal(goes_TE, np.asarray(LOGIT_GTE[0]) >= 0)


def test_a_group_counts_its_real_tokens():
  """Padding moves no cut and gets no slot; of a step of padding alone the cuts stay."""
  padded_GTE = jnp.concatenate([LOGIT_GTE, LOGIT_GTE + 5], axis=1)
  mask_GT = (jnp.arange(16) < 8)[None]
  routing, alone = route(router(), padded_GTE, mask_GT), route(router())
  np.testing.assert_array_equal(routing.stats["kappa"], alone.stats["kappa"])
  assert by_expert(routing) == by_expert(alone)
  given = router([1.0, 2.0, 3.0, 4.0])
  step(given, route(given, padded_GTE, mask_GT & False))
  assert given.cut_E[...].tolist() == [1, 2, 3, 4] and given.steps[...] == 0


def test_cuts_are_of_the_mean_over_groups():
  """However many groups a device or a micro-batch has: sums, and their number."""
  given = router(decay=0.0, **FREE)
  both = route(given, jnp.concatenate([LOGIT_GTE, SECOND_GTE]), jnp.concatenate([MASK_GT] * 2))
  parts = [route(given), route(given, SECOND_GTE)]
  summed = jax.tree.map(jnp.add, *(part.stats for part in parts))
  jax.tree.map(np.testing.assert_array_equal, both.stats, summed)
  step(given, both)
  kappa_GE = [[2, 1.5, 1.3, 1], [1.1, 0.85, 0.75, 0.6]]
  np.testing.assert_allclose(given.cut_E[...], np.mean(kappa_GE, 0), rtol=1e-6)


@pytest.mark.parametrize("fields, causality", [
    ({}, "batch"), (dict(warmup_steps=0), "batch"), (dict(slack=4.0), "batch"), (FREE, "self")], ids=str)
def test_a_causal_decoder_takes_it_without_warm_up_and_bounds(fields, causality):
  assert router(**fields).causality == causality


@pytest.mark.parametrize("fields, message", [
    (dict(decay=1.0), "router.decay=1.0 is out of range; choose from 0 to below 1"),
    (dict(warmup_steps=-1), "router.warmup_steps=-1 is negative; choose 0 or more"),
    (dict(slack=-1.0), "router.slack=-1.0 is negative; choose 0 or more, 4 for no bounds"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
