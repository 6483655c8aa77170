"""Places labels next to points so that no two overlap; those that find no room nearby move farther away."""

from collections.abc import Iterator, Sequence

import numpy as np

Box = tuple[float, float, float, float]  # left, bottom, right, top

PAD = 2.0  # free pixels around a label
RADII = (5, 9, 14, 20, 28, 38, 50, 65, 85, 110, 140, 180, 230, 300)  # pixels from point to label
DIRECTIONS = (0, 90, 45, 315, 270, 135, 180, 225, *range(15, 360, 15))  # degrees, the preferred ones first
LEADER = 12  # a label farther away gets a line to its point


def place(points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], bounds: Box,
          obstacles: Sequence[Box] = ()) -> list[Box]:
  """A box for each point's label of that size (width, height), all in pixels, y upwards.

  Boxes lie within `bounds` and overlap neither each other nor `obstacles`, nor another label's leader line,
  as long as there is room. All labels try the nearest radius before any tries the next.
  """
  boxes: dict[int, Box] = {}
  for strict in (True, False):  # without room for all, leader lines may be crossed
    for radius in RADII:
      for i in range(len(points)):
        if i not in boxes:
          free = (box for box in _candidates(points[i], sizes[i], radius)
                  if _is_free(box, points[i], boxes, points, bounds, obstacles, strict))
          if box := next(free, None):
            boxes[i] = box
  for i, point in enumerate(points):
    boxes.setdefault(i, next(_candidates(point, sizes[i], RADII[0])))
  return [boxes[i] for i in range(len(points))]


def anchor(box: Box, point: tuple[float, float]) -> tuple[float, float]:
  """The place of the box that is nearest to its point, where a leader line ends."""
  return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def needs_leader(box: Box, point: tuple[float, float]) -> bool:
  return float(np.hypot(*np.subtract(anchor(box, point), point))) > LEADER


def overlap(a: Box, b: Box, pad: float = 0.0) -> bool:
  return a[0] < b[2] + pad and b[0] < a[2] + pad and a[1] < b[3] + pad and b[1] < a[3] + pad


def _candidates(point: tuple[float, float], size: tuple[float, float], radius: float) -> Iterator[Box]:
  (x, y), (w, h) = point, size
  for degrees in DIRECTIONS:
    ux, uy = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    cx, cy = float(x + ux * (radius + w / 2)), float(y + uy * (radius + h / 2))
    yield cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def _is_free(box: Box, point: tuple[float, float], boxes: dict[int, Box],
             points: Sequence[tuple[float, float]], bounds: Box, obstacles: Sequence[Box],
             strict: bool) -> bool:
  if box[0] < bounds[0] or box[1] < bounds[1] or box[2] > bounds[2] or box[3] > bounds[3]:
    return False
  if any(overlap(box, other, PAD) for other in (*boxes.values(), *obstacles)):
    return False
  if not strict:
    return True
  ends = {i: anchor(other, points[i]) for i, other in boxes.items() if needs_leader(other, points[i])}
  if any(_crosses(points[i], end, box) for i, end in ends.items()):
    return False
  return not needs_leader(box, point) or not any(
      _crosses(point, anchor(box, point), other) for other in boxes.values())


def _crosses(a: tuple[float, float], b: tuple[float, float], box: Box) -> bool:
  """Whether the segment from a to b meets the box."""
  t = np.linspace(0, 1, 25)
  x, y = a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])
  return bool(((x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])).any())
