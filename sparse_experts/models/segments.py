"""Group layers into scans: a sequence of layer kinds as (pattern, repeats) segments."""

import functools
from collections.abc import Hashable, Sequence

Segment = tuple[tuple[Hashable, ...], int]


def find_segments(kinds: Sequence[Hashable]) -> tuple[Segment, ...]:
  """Segments whose patterns, repeated and joined, spell `kinds`.

  Each block of a pattern is compiled once, so the total pattern length is what compile time grows
  with: the least total wins, then the fewest segments. `[dense, sparse] x 6`;
  `[dense] x 20 + [dense, sparse] x 2`.
  """
  kinds = tuple(kinds)

  @functools.cache
  def period(start: int, stop: int) -> int:
    n = stop - start
    return next(p for p in range(1, n + 1)
                if n % p == 0 and kinds[start:start + p] * (n // p) == kinds[start:stop])

  # best[stop]: (total pattern length, segments, start of the last one) of kinds[:stop].
  best: list[tuple[int, int, int]] = [(0, 0, 0)]
  for stop in range(1, len(kinds) + 1):
    best.append(min((best[start][0] + period(start, stop), best[start][1] + 1, start)
                    for start in range(stop)))

  segments: list[Segment] = []
  stop = len(kinds)
  while stop:
    start = best[stop][2]
    p = period(start, stop)
    segments.append((kinds[start:start + p], (stop - start) // p))
    stop = start
  return tuple(reversed(segments))


def where(segments: Sequence[Segment], layer: int) -> tuple[int, int, int]:
  """(segment, repeat, position in the pattern) of a layer."""
  places = [(s, repeat, position) for s, (pattern, repeats) in enumerate(segments)
            for repeat in range(repeats) for position in range(len(pattern))]
  return places[layer]
