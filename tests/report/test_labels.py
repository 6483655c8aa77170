"""Labels next to points: none overlaps another one, near ones stay near, and all lie within the bounds."""

import itertools

import numpy as np
import pytest

from sparse_experts.report import labels


def crowded(n):
  rng = np.random.default_rng(0)
  return [tuple(p) for p in 300 + rng.normal(0, 12, (n, 2))], [(60.0, 10.0)] * n


@pytest.mark.parametrize("n", [1, 6, 24])
def test_no_two_overlap_where_points_crowd(n):
  points, sizes = crowded(n)
  dots = [(x - 3, y - 3, x + 3, y + 3) for x, y in points]
  boxes = labels.place(points, sizes, (0, 0, 600, 600), dots)
  assert not [1 for a, b in itertools.combinations(boxes, 2) if labels.overlap(a, b)]
  assert not [1 for box, dot in itertools.product(boxes, dots) if labels.overlap(box, dot)]
  assert min(min(box[:2]) for box in boxes) >= 0 and max(max(box[2:]) for box in boxes) <= 600
  assert all((box[2] - box[0], box[3] - box[1]) == pytest.approx((60, 10)) for box in boxes)


def test_a_label_with_room_is_right_of_its_point_and_has_no_leader():
  (box, far), sizes = labels.place([(100, 100), (400, 100)], [(50, 10)] * 2, (0, 0, 600, 200)), (50, 10)
  assert box == pytest.approx((105, 95, 155, 105)) and far[0] == pytest.approx(405)
  assert not labels.needs_leader(box, (100, 100))
  assert labels.needs_leader(box, (80, 100)) and labels.anchor(box, (80, 100)) == (105, 100)
  at_the_edge, = labels.place([(590, 100)], [sizes], (0, 0, 600, 200))
  assert at_the_edge[2] <= 600 and not labels.needs_leader(at_the_edge, (590, 100))


def test_without_room_every_point_still_has_its_label():
  points, sizes = crowded(30)
  assert len(labels.place(points, sizes, (280, 280, 320, 320))) == 30
