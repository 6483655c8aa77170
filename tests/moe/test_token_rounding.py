"""Token rounding: the lists of the authors' code, targets, padding, and that evaluation is top-k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import make_router
from tests.moe.golden_2026 import LOGIT_GTE, MASK_GT, PRINTED, TOP_2, sets, taken

KEY = jax.random.key(0)


def router(**fields):
  return make_router("token_rounding", 4, 4, rngs=nnx.Rngs(0), **{"tile": 4, **fields})


def route(logit_GTE=LOGIT_GTE, mask_GT=MASK_GT, key=KEY, **fields):
  return jax.jit(lambda *given: router(**fields).route(*given, key=key))(logit_GTE, mask_GT)


def test_golden_down():
  gate_TE, goes_TE = taken(route(round="down"))
  kept = {(0, 0): .817574, (0, 1): .182426, (1, 0): .622459, (1, 1): .377541, (2, 1): .750260,
          (3, 0): .574443, (4, 0): .750260, (6, 1): .524979}
  assert {(int(t), int(e)) for t, e in np.argwhere(goes_TE)} == set(kept)
  for place, gate in kept.items():
    np.testing.assert_allclose(gate_TE[place], gate, atol=PRINTED)


@pytest.mark.parametrize("how", ["up", "nearest"])
def test_golden_filled(how):
  routing = route(round=how)
  gate_TE, goes_TE = taken(routing)
  np.testing.assert_array_equal(goes_TE.sum(0), [8, 4, 4, 4])
  plain_TE, own_TE = taken(route(key=None))
  filled = {(2, 0): .123482, (5, 0): .075577, (1, 2): .126241, (0, 3): .105146}
  assert {(int(t), int(e)) for t, e in np.argwhere(goes_TE & ~own_TE)} == set(filled)
  for place, gate in filled.items():
    np.testing.assert_allclose(gate_TE[place], gate, atol=PRINTED)
  np.testing.assert_allclose(gate_TE[own_TE], plain_TE[own_TE], rtol=1e-6)
  np.testing.assert_allclose([gate_TE[4, 2], gate_TE[7, 3]], [0.249740, 0.785835], atol=PRINTED)


def test_evaluation_is_top_k():
  routing = route(key=None)
  assert sets(routing) == TOP_2 and routing.rows_per_token == 2
  np.testing.assert_allclose(taken(routing)[0].sum(1), 1, rtol=1e-6)
  np.testing.assert_array_equal(routing.metrics["load"][0], [6, 4, 3, 3])
  np.testing.assert_allclose(routing.losses["load_balance"][0], 1.104322, atol=PRINTED)
  np.testing.assert_allclose(route().losses["load_balance"][0], 1.104322, atol=PRINTED)


@pytest.mark.parametrize("how, counts, expected", [
    ("nearest", [0, 1, 2, 3, 5, 6, 7, 10], [0, 0, 0, 4, 4, 8, 8, 8]),  # halves: 2, 6, 10
    ("up", [0, 1, 4, 5, 8, 13], [0, 4, 4, 8, 8, 12]),  # of 13 tokens no more than 12 fill tiles
    ("down", [3, 4, 7, 13], [0, 4, 4, 12]),
])
def test_targets(how, counts, expected):
  found = router(round=how)._rounded(jnp.array([counts]), jnp.array([13]))
  assert found.tolist() == [expected]


def test_padding_is_never_filled_in():
  """Three of eight tokens are real, fewer than a tile: nobody is routed; with five, four at most."""
  three = route(mask_GT=MASK_GT & (jnp.arange(8) < 3)[None], round="up")
  assert not three.valid.any()
  _, goes_TE = taken(route(mask_GT=MASK_GT & (jnp.arange(8) < 5)[None], round="up"))
  assert goes_TE.sum(0).tolist() == [4, 4, 4, 4] and not goes_TE[5:].any()


@pytest.mark.parametrize("fields, message", [
    (dict(tile=0), "router.tile=0 holds no token; choose 1 or more"),
    (dict(round="even"), "router.round='even' is unknown"),
    (dict(k=5), "router.k=5 is not between 1 and num_experts=4"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)


def test_a_tile_larger_than_the_group_is_refused():
  with pytest.raises(UserError, match="router.tile=9 is more than the 8 tokens of a group; lower it"):
    route(tile=9)
