"""Pictures of twenty arms: labels do not overlap, arms differ also without colour, intervals are paired."""

import io

import numpy as np
import pytest
from PIL import Image

from sparse_experts.moe import Routing
from sparse_experts.report import pictures, plots
from sparse_experts.report.looks import looks

ARMS = [f"a_router_with_a_name_{i}" for i in range(20)]


def outcome(names, seeds=3, base=0):
  """Made up: seeds share an offset that is ten times what arms differ by."""
  arms, steps = {}, list(range(10, 110, 10))
  for i, name in enumerate(names):
    values = {str(s): 2.0 + s + 0.01 * i + 0.001 * (s % 2) for s in range(seeds)}
    arms[name] = {"remarks": ["2 of 5 runs diverged"] * (i == 1), "values": values, "curves": {
        s: dict(step=steps, minutes=[(1 + i) * step / 100 for step in steps],
                loss=[value + 9 / step for step in steps]) for s, value in values.items()}}
  return {"unit": "nats per byte", "baseline": names[base], "arms": arms}


@pytest.fixture(scope="module")
def crowded():
  """A picture with all that twenty arms may have in it, arranged."""
  rng = np.random.default_rng(0)
  picture, (seeds, scatter, grouped, bars, heat, images) = plots.panels("AB;CD;EF", 9, 12, arms=ARMS)
  plots.seeds(seeds, {name: rng.normal(i, 1, 3) for i, name in enumerate(ARMS)}, "loss, nats", line=0)
  plots.scatter(scatter, {name: tuple(rng.normal(0.5, 0.03, 2)) for name in ARMS}, "agreement", "oracle gap")
  some = {name: {f"setting number {g}": rng.normal(0, 1, 3) for g in range(8)} for name in ARMS[:4]}
  plots.grouped(grouped, some, "accuracy, %", references={ARMS[0]: {"setting number 1": (0, -1, 1)}})
  plots.bars(bars, {name: [1, 2] for name in ARMS[:3]}, ["one", "two"], "experts")
  plots.heat(heat, rng.random((24, 8)), [f"domain {d}" for d in range(24)], "expert", "share", percent=True)
  plots.images(images, {"expert 0": [rng.random((4, 4))] * 3, "expert 1": [rng.random((4, 4, 3))]}, "patches")
  plots.legend(picture)
  picture.arrange()
  return picture


def test_no_two_labels_overlap_and_none_is_cut_off(crowded):
  texts = crowded.labelled()
  names = [text for text, _ in texts]
  assert names.count(ARMS[19]) == 3  # of its row, its point and in the legend
  assert {"setting number 7", "domain 23", "expert 1", "agreement"} <= {*names}
  assert crowded.overlaps() == []
  width, height = crowded.bbox.size
  assert not [text for text, (x0, y0, x1, y1) in texts if min(x0, y0) < 0 or x1 > width or y1 > height]


def test_overlaps_are_found():
  picture, (left, _) = plots.panels("AB")
  left.text(0.5, 0.5, "one")
  left.text(0.5, 0.5, "other")
  picture.draw_without_rendering()
  assert picture.overlaps() == [("one", "other")]


def test_arms_are_told_apart_by_colour_and_without_it():
  look = looks(ARMS)
  assert len({of["color"] for of in looks(ARMS[:18]).values()}) == 18
  assert len({(of["marker"], str(of["linestyle"])) for of in look.values()}) == 20
  assert looks(ARMS[:3])[ARMS[0]] == look[ARMS[0]]


@pytest.mark.parametrize("names, base", [(["dense", "switch"], 0), (ARMS[:7], 2), (["alone"], 0)],
                         ids=["two", "seven", "one"])
def test_the_arms_of_a_sweep(names, base):
  picture = pictures.arms(outcome(names, base=base))
  png = picture.png()
  assert Image.open(io.BytesIO(png)).format == "PNG"
  assert picture.overlaps() == []
  final, paired, by_step, by_time, *by_arm = picture.axes
  assert [axes.get_xlabel() for axes in (final, paired, by_step, by_time)] == [
      "final figure, nats per byte", f"minus {names[base]}, nats per byte", "step", "training time, minutes"]
  assert by_step.get_ylabel() == "training loss, nats"
  assert len(by_arm) == (0 if len(names) == 1 else 1 if len(names) <= 4 else len(names) - 1)
  if len(names) > 1:
    assert final.get_yticklabels()[1].get_text() == f"{names[1]}\n2 of 5 runs diverged"


def test_intervals_are_of_paired_differences():
  """Seeds differ by 1, arms by 0.01 in every pair: the interval of the difference is a point."""
  picture = pictures.arms(outcome(["dense", "switch"]))
  _, paired, _, _, difference = picture.axes
  spans = [line.get_xdata() for line in paired.get_lines() if len(line.get_xdata()) == 2]
  zero, interval = spans[0], spans[-1]
  assert list(zero) == [0, 0] and interval == pytest.approx([0.01, 0.01], abs=1e-9)
  # Over the steps: the mean is 0.01 everywhere, and what is drawn is whole, without the first fifth.
  curve = difference.get_lines()[1]
  assert curve.get_ydata() == pytest.approx([0.01] * 8)
  assert difference.get_xlabel() == "step, after the first fifth"
  low, high = difference.get_ylim()
  assert low < 0 and high > 0.01
  assert difference.get_ylabel() == "minus dense, nats"


def test_points_that_would_cover_each_other_are_stacked():
  assert plots.stacked([0.0, 5.0, 0.1, 0.0, 9.0], 9.0).tolist() == [0, 0, 2, 1, 0]
  assert plots.stacked([1.0] * 4, 0.0).tolist() == [0, 1, 2, 0]


def test_curves_are_paired_at_the_steps_they_share():
  a = {0: ([1, 2, 3], [5.0, 4.0, 3.0]), 1: ([2, 3], [1.0, 1.0]), 7: ([2], [0.0])}
  b = {0: ([2, 3, 4], [3.0, 1.0, 0.0]), 1: ([1, 2, 3], [0.0, 2.0, 3.0])}
  x_N, y_SN = plots.paired(a, b)
  assert x_N.tolist() == [2, 3] and y_SN.tolist() == [[1, 2], [-1, -2]]
  assert plots.interval([1.0, -1.0]) == pytest.approx((0, -12.706, 12.706), rel=1e-4)
  assert plots.paired(a, {5: ([1], [1.0])})[0].size == 0


@pytest.mark.parametrize("paths, short", [
    (("runs/sweeps/a/switch", "runs/sweeps/a/dense/"), ("switch", "dense")),
    (("runs/a", "runs/a/1"), ("a", "1")),
    (("runs/a", "runs/a"), ("a (a)", "a (b)")),
    (("x/" + "long" * 20, "x/b"), ("longlonglonglon…longlonglonglong", "b")),
])
def test_names_of_two_folders_are_short(paths, short):
  assert pictures.short_names(*paths) == short


def test_routes_show_who_got_a_slot():
  """Of one group: a dot, a cross, nothing for a choice that the router skipped."""
  group = lambda *values: np.array([[9] * 4, values])
  routing = Routing(token=group(0, 1, 2, 3), expert=group(2, 0, 2, 1), valid=group(1, 1, 1, 0) == 1,
                    kept=group(1, 1, 0, 0) == 1)
  picture, (axes,) = plots.panels("A")
  plots.routes(axes, routing, 3, group=1)
  marks = {line.get_marker(): line.get_xydata().tolist() for line in axes.get_lines()}
  assert marks == {"o": [[0, 2], [1, 0]], "x": [[2, 2]]}


def test_domains_by_expert():
  of = dict(step=[1] * 4, layer=["decoder/01"] * 4, domain=[0, 0, 1, 1], expert=[0, 1, 2, 2],
            valid=[True] * 4)
  traced = {name: np.array(values) for name, values in of.items()}
  picture = pictures.domains(traced, {"decoder/01": 3}, ["books", "code"])
  axes, bar = picture.axes
  assert axes.images[0].get_array().tolist() == [[0.5, 0.5, 0], [0, 0, 1]]
  assert axes.get_xlabel() == "expert" and bar.get_ylabel() == "share of the domain's assignments"
  assert axes.get_title() == "decoder/01 at step 1"
