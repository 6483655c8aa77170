"""Which rows travel, by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.moe.parallel import exchange

n, e, R = 4, 3, 20


@pytest.fixture(params=range(5))
def size_sE(request):
  """Rows of four devices for twelve experts, at most R in sum; some have none."""
  rng = np.random.default_rng(request.param)
  share_sE = rng.dirichlet(np.full(n * e, 0.3), size=n)
  return np.floor(share_sE * rng.integers(0, R + 1, (n, 1))).astype(np.int32)


@pytest.mark.parametrize("N", [4, 12, 20, n * R])
def test_bounds_are_the_largest_that_fit(size_sE, N):
  count_sd = size_sE.reshape(n, n, e).sum(2)
  bound_d = np.asarray(exchange._bounds(jnp.asarray(count_sd), N))
  coming = lambda bound_d: np.minimum(count_sd, bound_d).sum(0)
  assert (coming(bound_d) <= N).all()
  assert (coming(bound_d) == np.where(coming(bound_d + 1) <= N, count_sd.sum(0), coming(bound_d))).all()
  np.testing.assert_array_equal(bound_d >= count_sd.max(0), count_sd.sum(0) <= N)


@pytest.mark.parametrize("N", [4, 12, n * R])
def test_runs_fill_the_room_by_expert_then_source(size_sE, N):
  """Sent as planned, rows lie without gaps, those of an expert together; the way back is the way there."""
  plans = [list(map(np.asarray, jax.tree.leaves(exchange.ragged(jnp.asarray(size_sE), me, R, N))))
           for me in range(n)]
  room = [{} for _ in range(n)]  # place -> (source, row)
  for source, plan in enumerate(plans):
    start, size, target = plan[:3]
    served = {(source, r) for r in np.flatnonzero(plan[9])}
    sent = set()
    for run in range(n * e):
      for i in range(size[run]):
        place = room[run // e]
        assert target[run] + i not in place, "two rows in one place"
        place[int(target[run] + i)] = (source, int(start[run] + i))
        sent.add((source, int(start[run] + i)))
    assert sent == served
  expert = [np.repeat(np.arange(n * e), size_E) for size_E in size_sE]
  for me, (place, plan) in enumerate(zip(room, plans)):
    assert sorted(place) == list(range(plan[8].sum())) and len(place) <= N
    order = [(expert[s][r], s, r) for _, (s, r) in sorted(place.items())]
    assert order == sorted(order)
    np.testing.assert_array_equal(np.bincount([x - me * e for x, _, _ in order], minlength=e), plan[8])
    start, size, target, coming = plan[4:8]
    for run in range(n * e):
      for i in range(size[run]):
        assert place[int(start[run] + i)] == (run // e, target[run] + i)
    np.testing.assert_array_equal(coming, plan[1])
    np.testing.assert_array_equal(size, plan[3])
