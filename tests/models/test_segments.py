import itertools
import time

import pytest

from sparse_experts.models.segments import find_segments, where


def best_by_force(kinds):
  """(total pattern length, segments) over every cut into repeated patterns."""
  if not kinds:
    return 0, 0
  found = []
  for n in range(1, len(kinds) + 1):
    head = kinds[:n]
    p = min(p for p in range(1, n + 1) if n % p == 0 and head[:p] * (n // p) == head)
    total, count = best_by_force(kinds[n:])
    found.append((total + p, count + 1))
  return min(found)


def test_no_cut_is_better():
  for n in range(1, 9):
    for kinds in itertools.product("ds", repeat=n):
      segments = find_segments(kinds)
      assert sum((pattern * repeats for pattern, repeats in segments), ()) == kinds
      assert (sum(len(p) for p, _ in segments), len(segments)) == best_by_force(kinds), kinds


@pytest.mark.parametrize("kinds, segments", [
    ("ds" * 6, ((("d", "s"), 6),)),
    ("d" * 20 + "dsds", ((("d",), 20), (("d", "s"), 2))),  # Last-2
    ("d" * 12, ((("d",), 12),)),
    ("dsd", ((("d", "s", "d"), 1),)),
    ("ddds" * 6, ((("d", "d", "d", "s"), 6),)),
])
def test_known_stacks(kinds, segments):
  assert find_segments(kinds) == segments


def test_long_stacks_are_cut_in_a_moment():
  """The periods of all parts of a stack were compared layer by layer: 30 s for 800 layers."""
  begin = time.perf_counter()
  assert find_segments("ds" * 400) == ((("d", "s"), 400),)
  assert time.perf_counter() - begin < 5


def test_where_names_each_layer_once():
  segments = find_segments("d" * 5 + "dsds" + "s")
  places = [where(segments, layer) for layer in range(10)]
  assert len(set(places)) == 10
  assert [segments[s][0][position] for s, _, position in places] == list("d" * 5 + "dsds" + "s")
  assert all(repeat < segments[s][1] for s, repeat, _ in places)
  with pytest.raises(IndexError):
    where(segments, 10)
