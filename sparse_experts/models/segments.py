"""Group layers into scans: a sequence of layer kinds as (pattern, repeats) segments."""

from collections.abc import Hashable, Sequence

Segment = tuple[tuple[Hashable, ...], int]


def find_segments(kinds: Sequence[Hashable]) -> tuple[Segment, ...]:
  """Segments whose patterns, repeated and joined, spell `kinds`.

  Each block of a pattern is compiled once, so the total pattern length is what compile time grows
  with: the least total wins, then the fewest segments. `[dense, sparse] x 6`;
  `[dense] x 20 + [dense, sparse] x 2`.
  """
  kinds = tuple(kinds)
  number = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
  period = [_periods([number[kind] for kind in kinds[start:]]) for start in range(len(kinds))]

  # best[stop]: (total pattern length, segments, start of the last one) of kinds[:stop].
  best: list[tuple[int, int, int]] = [(0, 0, 0)]
  for stop in range(1, len(kinds) + 1):
    best.append(min((best[start][0] + period[start][stop - start], best[start][1] + 1, start)
                    for start in range(stop)))

  segments: list[Segment] = []
  stop = len(kinds)
  while stop:
    start = best[stop][2]
    p = period[start][stop - start]
    segments.append((kinds[start:start + p], (stop - start) // p))
    stop = start
  return tuple(reversed(segments))


def _periods(kinds: Sequence[int]) -> list[int]:
  """Length of the shortest pattern whose repeats are kinds[:n], for n from 0 on; in linear time.

  Knuth, Morris and Pratt's prefix function: kinds[:n] begins as it ends over `border` layers.
  """
  periods, border = [0, *([1] * bool(kinds))], [0]
  for i in range(1, len(kinds)):
    b = border[-1]
    while b and kinds[i] != kinds[b]:
      b = border[b - 1]
    border.append(b + (kinds[i] == kinds[b]))
    n, p = i + 1, i + 1 - border[-1]
    periods.append(p if n % p == 0 else n)
  return periods


def where(segments: Sequence[Segment], layer: int) -> tuple[int, int, int]:
  """(segment, repeat, position in the pattern) of a layer."""
  for s, (pattern, repeats) in enumerate(segments):
    if layer < len(pattern) * repeats:
      return s, *divmod(layer, len(pattern))
    layer -= len(pattern) * repeats
  raise IndexError(f"the segments have no layer {layer} more")
