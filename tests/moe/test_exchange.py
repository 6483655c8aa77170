"""Which rows travel in which round, by counting."""

import math

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


def counts(size_sE):
  return size_sE.reshape(n, n, e).sum(2)


@pytest.mark.parametrize("N", [4, 12, 20, n * R])
def test_rounds_are_as_many_as_needed(size_sE, N):
  """Padded, the longest run counts; ragged, the device that most rows are for."""
  assert exchange.padded_rounds(jnp.asarray(size_sE), N) == math.ceil(counts(size_sE).max() / (N // n))
  assert exchange.ragged_rounds(jnp.asarray(size_sE), N) == math.ceil(counts(size_sE).sum(0).max() / N)


def plans_of_rounds(plan, rounds, size_sE, N):
  """For each round, each device's plan as arrays."""
  return [[list(map(np.asarray, jax.tree.leaves(plan(jnp.asarray(size_sE), me, R, N, k)))) for me in range(n)]
          for k in range(int(rounds(jnp.asarray(size_sE), N)))]


@pytest.mark.parametrize("N", [4, 12, n * R])
def test_every_row_travels_in_one_padded_round(size_sE, N):
  """To the device of its expert, between the rows of experts before and after; others stay."""
  expert = [np.repeat(np.arange(n * e), size_E) for size_E in size_sE]
  travelled = set()
  for plans in plans_of_rounds(exchange.padded, exchange.padded_rounds, size_sE, N):
    rows = [plan[0].reshape(n, N // n) for plan in plans]  # by source, of each destination
    for source, plan in enumerate(plans):
      for place in np.flatnonzero(plan[0] < R):
        assert plan[1][plan[0][place]] == place and (source, plan[0][place]) not in travelled
        travelled.add((source, plan[0][place]))
      assert (plan[1] < N).sum() == (plan[0] < R).sum()
    for me, plan in enumerate(plans):
      came = np.concatenate([row_nB[me] for row_nB in rows])
      source = np.repeat(np.arange(n), N // n)
      order = [(expert[source[i]][came[i]], source[i], came[i]) for i in plan[3] if i < N]
      assert order == sorted(order) and len(order) == (came < R).sum() == plan[4].sum()
      np.testing.assert_array_equal(np.bincount([x - me * e for x, *_ in order], minlength=e), plan[4])
  assert travelled == {(s, r) for s in range(n) for r in range(size_sE[s].sum())}


@pytest.mark.parametrize("N", [4, 12, n * R])
def test_runs_fill_the_room_by_expert_then_source(size_sE, N):
  """Sent as planned, rows lie without gaps, those of an expert together; the way back is the way there."""
  travelled = set()
  rounds = plans_of_rounds(exchange.ragged, exchange.ragged_rounds, size_sE, N)
  for k, plans in enumerate(rounds):
    room = room_of_round(plans)
    arrivals = [source_row for place in room for source_row in place.values()]
    assert len(set(arrivals)) == len(arrivals) and not travelled & set(arrivals)
    travelled |= set(arrivals)
    check_round(size_sE, N, plans, room)
    wanted = counts(size_sE).sum(0)
    np.testing.assert_array_equal([len(place) for place in room], np.clip(wanted - k * N, 0, N))
  assert travelled == {(s, r) for s in range(n) for r in range(size_sE[s].sum())}


def room_of_round(plans):
  """For each device, place -> (source, row)."""
  room = [{} for _ in range(n)]
  for source, plan in enumerate(plans):
    start, size, target = plan[:3]
    for run in range(n * e):
      for i in range(size[run]):
        place = room[run // e]
        assert target[run] + i not in place, "two rows in one place"
        place[int(target[run] + i)] = (source, int(start[run] + i))
  return room


def check_round(size_sE, N, plans, room):
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
