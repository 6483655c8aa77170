"""Places labels next to points so that no two overlap; those that find no room nearby move farther away."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

Box = tuple[float, float, float, float]  # left, bottom, right, top

PAD = 2.0  # free pixels around a label
RADII = (5, 9, 14, 20, 28, 38, 50, 65, 85, 110, 140)  # pixels from point to label
DIRECTIONS = (0, 90, 45, 315, 270, 135, 180, 225, *range(15, 360, 15))  # degrees, the preferred ones first
_FLAT = 0.3  # a direction is sideways, or up or down, if the other part of its unit vector is smaller
LEADER = 12  # a label farther away gets a line to its point


def place(points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], bounds: Box,
          obstacles: Sequence[Box] = ()) -> list[Box]:
  """A box for each point's label of that size (width, height), all in pixels, y upwards.

  Boxes lie within `bounds` and overlap neither each other nor `obstacles`, such as the points' marks, and
  leader lines cross nothing, as long as there is room. All labels try the nearest radius before any tries the
  next.
  """
  boxes: dict[int, Box] = {}
  free = lambda i, candidates, strict: (
      box for box in candidates if _is_free(box, points[i], boxes, points, bounds, obstacles, strict))
  missing = lambda: (i for i in range(len(points)) if i not in boxes)
  for radius in RADII:
    for i in missing():
      if box := next(free(i, _around(points[i], sizes[i], radius), strict=True), None):
        boxes[i] = box
  for i in missing():  # anywhere, and leader lines may be crossed
    found = free(i, _anywhere(points[i], sizes[i], bounds), strict=False)
    boxes[i] = next(found, next(_around(points[i], sizes[i], RADII[0])))
  return [boxes[i] for i in range(len(points))]


def anchor(box: Box, point: tuple[float, float]) -> tuple[float, float]:
  """The place of the box that is nearest to its point, where a leader line ends."""
  return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def needs_leader(box: Box, point: tuple[float, float]) -> bool:
  return _distance(box, point) > LEADER


def _distance(box: Box, point: tuple[float, float]) -> float:
  return math.dist(anchor(box, point), point)


def overlap(a: Box, b: Box, pad: float = 0.0) -> bool:
  return a[0] < b[2] + pad and b[0] < a[2] + pad and a[1] < b[3] + pad and b[1] < a[3] + pad


def _around(point: tuple[float, float], size: tuple[float, float], radius: float) -> Iterator[Box]:
  """Boxes whose nearest edge or corner is that far away; above and below centred, or to one side."""
  (x, y), (w, h) = point, size
  for degrees in DIRECTIONS:
    ux, uy = (float(f(np.radians(degrees))) for f in (np.cos, np.sin))
    bottom = y + radius * uy - (0 if uy > _FLAT else h if uy < -_FLAT else h / 2)
    right, left = x + radius * ux, x + radius * ux - w
    for at in (right,) if ux > _FLAT else (left,) if ux < -_FLAT else (x - w / 2, x - radius, x + radius - w):
      yield at, bottom, at + w, bottom + h


def _anywhere(point: tuple[float, float], size: tuple[float, float], bounds: Box) -> list[Box]:
  """Boxes all over the bounds, the nearest first."""
  w, h = size
  grid = itertools.product(np.arange(bounds[0], bounds[2] - w, 6), np.arange(bounds[1], bounds[3] - h, 4))
  boxes = [(float(x), float(y), float(x + w), float(y + h)) for x, y in grid]
  return sorted(boxes, key=lambda box: _distance(box, point))


def _is_free(box: Box, point: tuple[float, float], boxes: dict[int, Box],
             points: Sequence[tuple[float, float]], bounds: Box, obstacles: Sequence[Box],
             strict: bool) -> bool:
  if box[0] < bounds[0] or box[1] < bounds[1] or box[2] > bounds[2] or box[3] > bounds[3]:
    return False
  if any(overlap(box, other, PAD) for other in (*boxes.values(), *obstacles)):
    return False
  if not strict:
    return True
  leaders = [(points[i], anchor(other, points[i])) for i, other in boxes.items()
             if needs_leader(other, points[i])]
  if any(_crosses(start, end, box) for start, end in leaders):
    return False
  if not needs_leader(box, point):
    return True
  end = anchor(box, point)
  others = (other for other in obstacles if not overlap(other, (*point, *point)))
  return not (any(_crosses(point, end, other) for other in (*boxes.values(), *others))
              or any(_cross(point, end, *leader) for leader in leaders))


def _crosses(a: tuple[float, float], b: tuple[float, float], box: Box) -> bool:
  """Whether the segment from a to b meets the box."""
  t = np.linspace(0, 1, 25)
  x, y = a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])
  return bool(((x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])).any())


def _cross(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float],
           d: tuple[float, float]) -> bool:
  """Whether the segments from a to b and from c to d cross."""
  side = lambda p, q, r: (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])
  return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
