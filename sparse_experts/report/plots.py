"""Every picture of the project is drawn here: panels, marks that tell arms apart without colour, one style.

    picture, (left, right) = plots.panels("AB")
    plots.seeds(left, {"switch": [1.91, 1.90], "dense": [1.85, 1.83]}, "loss, nats per byte")
    plots.save(picture, "picture.png")

Names of arms are {name: ...} throughout; a name has the colour of `colours`, and in a picture a marker and a
line style of its own. Labels of axes name what is shown and its unit.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sparse_experts import storage
from sparse_experts.analysis.compare import spread
from sparse_experts.report.colours import FIRST
from sparse_experts.report.looks import HATCHES, PLAIN, Look, dots, looks, marked
from sparse_experts.report.picture import STYLE, Picture

if TYPE_CHECKING:
  from sparse_experts.moe import Routing

_STYLED = matplotlib.rc_context(STYLE)

Seeds = Mapping[Any, float] | Sequence[float]
Interval = tuple[float, float, float]  # mean, low, high
Curve = tuple[Sequence[float], Sequence[float]]  # x, y


@_STYLED
def panels(layout: str, width: float = 9.0, height: float = 3.5, *, arms: Iterable[str] = (),
           height_ratios: Sequence[float] | None = None) -> tuple[Picture, list[Axes]]:
  """An empty picture of that size in inches, and its panels in the order of the letters of `layout`.

  layout: rows with ; between them, a letter per panel, as wide as often it stands there, and . for a gap
  ("AAB;CDE"). Rows of as many letters are aligned.
  arms: all names, for the legend and so that an arm looks alike in panels that show some of them.
  """
  picture, rows = Picture(figsize=(width, height), layout="constrained"), layout.split(";")
  picture.looks = looks(arms)
  if len(set(map(len, rows))) == 1:
    named = picture.subplot_mosaic(layout, height_ratios=height_ratios)
  else:
    parts: Any = picture.subfigures(len(rows), 1, height_ratios=height_ratios)
    named = {}
    for part, row in zip(parts, rows, strict=True):
      named |= part.subplot_mosaic(row)
  return picture, [named[letter] for letter in sorted(named)]


def _looks(axes: Axes, names: Iterable[str]) -> dict[str, Look]:
  """Of the picture's arms, or of these names alone."""
  names, known = list(names), getattr(axes.get_figure(root=True), "looks", {})
  return {name: known[name] for name in names} if known.keys() >= set(names) else looks(names)


def interval(values: Seeds) -> Interval:
  """Mean of values over seeds and its 95% t-interval, which is (nan, nan) of fewer than two."""
  of = spread(_values(values))
  mean, half = (np.nan if x is None else x for x in (of.mean, of.half))
  return mean, mean - half, mean + half


@_STYLED
def seeds(axes: Axes, arms: Mapping[str, Seeds], label: str, *, line: float | None = None,
          intervals: Mapping[str, Interval] | None = None, plain: bool = False) -> None:
  """A row per arm, the first on top: a point per seed, and below it a tick at the mean with its interval.

  label: what the values are, with their unit. line: a value to compare with, such as 0 of differences.
  intervals: those to draw, if not the 95% t-interval of the mean of the values; of an arm without values
  too. plain: rows are no arms, and all of one colour.
  """
  intervals = {name: interval(arms[name]) for name in arms} if intervals is None else intervals
  rows = list(dict.fromkeys((*arms, *intervals)))
  ends = np.array([x for of in (*map(_values, arms.values()), *intervals.values()) for x in of])
  span = float(np.ptp(ends[np.isfinite(ends)])) if np.isfinite(ends).any() else 0.0
  look = dict.fromkeys(rows, PLAIN) if plain else _looks(axes, rows)
  if line is not None:
    axes.axvline(line, color="0.35", lw=1, zorder=1)
  for y, name in enumerate(rows):
    color, values = look[name]["color"], _values(arms.get(name, ()))
    axes.plot(values, y - 0.13 - 0.12 * stacked(values, span), **dots(look[name]))
    if name in intervals:
      mean, low, high = intervals[name]
      at = y + 0.17 if len(values) else y
      axes.plot([low, high], [at, at], color=color, lw=2, solid_capstyle="butt", zorder=2)
      axes.plot(mean, at, "|", ms=9, mew=2, color=color, zorder=3)
  axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=label)
  axes.set_yticks(range(len(rows)), rows)
  axes.tick_params(axis="y", length=0)
  axes.grid(visible=False, axis="y")


def stacked(values: Sequence[float], span: float) -> np.ndarray:
  """The level of each value's point, 0 to 2: equal ones must not cover each other on an axis of that span."""
  level, last = np.zeros(len(values), int), [-np.inf] * 3
  for i in np.argsort(values, kind="stable"):
    room = [values[i] - x > span / 45 for x in last]
    level[i] = room.index(True) if any(room) else int(np.argmin(last))
    last[level[i]] = values[i]
  return level


@_STYLED
def grouped(axes: Axes, arms: Mapping[str, Mapping[str, Seeds]], label: str, *,
            references: Mapping[str, Mapping[str, Interval]] = MappingProxyType({})) -> None:
  """{arm: {group: values}} as points: groups side by side, in each of them the arms.

  references: a mean and a band to hold the values against, of some arms and groups.
  """
  groups, look = list(dict.fromkeys(g for of in arms.values() for g in of)), _looks(axes, arms)
  for a, (name, of) in enumerate(arms.items()):
    color = look[name]["color"]
    shift, half = 0.8 * ((a + 0.5) / len(arms) - 0.5), 0.3 / len(arms)
    for at, group in ((groups.index(group) + shift, group) for group in of):
      if group in references.get(name, {}):
        mean, low, high = references[name][group]
        axes.fill_between([at - half, at + half], low, high, color=color, alpha=0.22, lw=0)
        axes.plot([at - half, at + half], [mean, mean], color=color, lw=1.5)
      values = _values(of[group])
      beside = at + half * np.linspace(-0.5, 0.5, len(values)) if len(values) > 1 else [at]
      axes.plot(beside, values, **dots(look[name]))
  axes.set_xticks(range(len(groups)), groups)
  axes.set(xlim=(-0.5, len(groups) - 0.5), ylabel=label)
  axes.tick_params(axis="x", length=0)
  axes.grid(visible=False, axis="x")
  for edge in range(1, len(groups)):
    axes.axvline(edge - 0.5, color="0.85", lw=0.8)


@_STYLED
def bars(axes: Axes, arms: Mapping[str, Sequence[float]], groups: Sequence[str], label: str) -> None:
  """{arm: a value per group} as bars from 0, the arms of a group side by side, hatched apart."""
  look, width = _looks(axes, arms), 0.8 / len(arms)
  for a, (name, values) in enumerate(arms.items()):
    at = np.arange(len(groups)) + (a - (len(arms) - 1) / 2) * width
    axes.bar(at, values, width, color=look[name]["color"], hatch=HATCHES[a % len(HATCHES)], edgecolor="white")
  axes.set_xticks(range(len(groups)), groups)
  axes.set_ylabel(label)
  axes.tick_params(axis="x", length=0)
  axes.grid(visible=False, axis="x")


@_STYLED
def curves(axes: Axes, arms: Mapping[str, Mapping[Any, Curve]], x: str, y: str) -> None:
  """{arm: {seed: curve}}: a thin line per seed, a thick one for their mean where they share all x."""
  look = _looks(axes, arms)
  for name, of in arms.items():
    many = [np.asarray(curve, float) for curve in of.values()]
    joint = len({tuple(x_N) for x_N, _ in many}) == 1
    for x_N, y_N in many:
      style = dict(alpha=0.35, lw=0.8) if joint and len(many) > 1 else marked(look[name], len(x_N))
      axes.plot(x_N, y_N, **(dict(color=look[name]["color"]) | style))
    if joint and len(many) > 1:
      axes.plot(many[0][0], np.mean([y_N for _, y_N in many], 0), **marked(look[name], len(many[0][0])))
  axes.set(xlabel=x, ylabel=y)


@_STYLED
def differences(axes: Axes, arms: Mapping[str, Mapping[Any, Curve]], baseline: str, x: str, y: str, *,
                shown_from: float = 0.2) -> None:
  """Each arm minus the baseline of equal seed at the same x: the mean, and its 95% t-interval as a band.

  shown_from: what comes before this part of x is left out; at the start of training differences are largest
  and say least, and an axis that fits them hides the others.
  """
  look = _looks(axes, arms)
  axes.axhline(0, color="0.35", lw=1)
  for name in arms:
    if name == baseline:
      continue
    x_N, y_SN = paired(arms[name], arms[baseline])
    if not len(x_N):
      continue
    late = x_N >= x_N[0] + shown_from * (x_N[-1] - x_N[0])
    x_N, y_SN = x_N[late], y_SN[:, late]
    mean_N, low_N, high_N = np.array([interval(list(y_S)) for y_S in y_SN.T]).T
    axes.plot(x_N, mean_N, **marked(look[name], len(x_N)))
    if len(y_SN) > 1:
      axes.fill_between(x_N, low_N, high_N, color=look[name]["color"], alpha=0.2, lw=0)
  axes.margins(y=0.08)
  axes.set(xlabel=x, ylabel=y)


def paired(arm: Mapping[Any, Curve], baseline: Mapping[Any, Curve]) -> tuple[np.ndarray, np.ndarray]:
  """(x_N, arm minus baseline_SN) over the seeds S and the x that all these curves have."""
  common = [seed for seed in arm if seed in baseline]
  points = [dict(zip(*of[seed], strict=True)) for seed in common for of in (arm, baseline)]
  x_N = np.array(sorted(set.intersection(*map(set, points))) if points else [], float)
  return x_N, np.array([[a[x] - b[x] for x in x_N] for a, b in zip(points[::2], points[1::2])])


@_STYLED
def heat(axes: Axes, a: np.ndarray, rows: Sequence[str], x: str, label: str, *,
         percent: bool = False) -> None:
  """A matrix as colours, light for little; `label` names the colour, x the columns, `rows` the rows."""
  image = axes.imshow(a, aspect="auto", vmin=0, cmap="viridis_r", interpolation="nearest")
  axes.figure.colorbar(image, ax=axes, label=label, format=PercentFormatter(1, 0) if percent else None)
  axes.set_yticks(range(len(rows)), rows)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_xlabel(x)
  axes.grid(visible=False)


@_STYLED
def routes(axes: Axes, routing: "Routing", num_experts: int, group: int = 0) -> None:
  """The assignments of one group, a column per token: a dot if it got a slot, a cross if it was dropped."""
  arrays = (routing.token, routing.expert, routing.kept, routing.valid)
  token_A, expert_A, kept_A, valid_A = (np.asarray(a_GA[group]) for a_GA in arrays)
  for marked_A, marker, color in ((kept_A, "o", FIRST[0]), (valid_A & ~kept_A, "x", FIRST[1])):
    axes.plot(token_A[marked_A], expert_A[marked_A], marker, ms=4, mew=1.2, color=color, linestyle="none")
  axes.set(xlim=(-0.7, token_A.max(initial=0) + 0.7), ylim=(num_experts - 0.4, -0.6), xlabel="token",
           ylabel="expert")
  axes.set_yticks(range(num_experts))
  axes.grid(visible=False, axis="x")


@_STYLED
def scatter(axes: Axes, points: Mapping[str, tuple[float, float]], x: str, y: str) -> None:
  """A named point each; `save` puts the names where none covers another."""
  picture = axes.get_figure(root=True)
  assert isinstance(picture, Picture)
  for name, of in _looks(axes, points).items():
    axes.plot(*points[name], **dots(of))
    picture.name_point(axes, name, points[name])
  axes.set(xlabel=x, ylabel=y)


@_STYLED
def images(axes: Axes, rows: Mapping[str, Sequence[np.ndarray]], label: str = "") -> None:
  """{name: images of one size} as a grid, a row per name; grey or RGB, 0 to 1."""
  H, W = next(iter(rows.values()))[0].shape[:2]
  grid = np.ones((len(rows) * (H + 1) - 1, max(map(len, rows.values())) * (W + 1) - 1, 3))
  for r, many in enumerate(rows.values()):
    for c, image in enumerate(many):
      image = image[..., None] if image.ndim == 2 else image
      grid[r * (H + 1):r * (H + 1) + H, c * (W + 1):c * (W + 1) + W] = np.clip(image, 0, 1)
  axes.imshow(grid, interpolation="nearest")
  axes.set_yticks([r * (H + 1) + (H - 1) / 2 for r in range(len(rows))], list(rows))
  axes.set(xticks=[], xlabel=label)
  axes.tick_params(length=0)
  axes.grid(visible=False)
  axes.spines[:].set_visible(False)


@_STYLED
def title(axes: Axes, text: str) -> None:
  axes.set_title(text)


def share_height(panels: Sequence[Axes]) -> None:
  """Gives panels of one measure one range, and its numbers and label to the first of each row only."""
  low, high = zip(*(axes.get_ylim() for axes in panels))
  for axes in panels:
    axes.set_ylim(min(low), max(high))
    place = axes.get_subplotspec()
    if place is not None and not place.is_first_col():
      axes.tick_params(labelleft=False)
      axes.set_ylabel("")


@_STYLED
def legend(picture: Picture, *, lines: bool = True) -> None:
  """Names, marks and, of curves, lines of the picture's arms in one row or more below it."""
  handles = [Line2D([], [], label=name, **(marked(of, 1) if lines else dots(of)))
             for name, of in picture.looks.items()]
  for columns in range(len(handles), 0, -1):
    found = picture.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)
    if found.get_window_extent().width < picture.bbox.width or columns == 1:
      return
    found.remove()


def save(picture: Picture, path: str) -> None:
  """Writes a PNG in which no label overlaps another, as far as there is room."""
  storage.write(path, picture.png())


def _values(values: Seeds) -> list[float]:
  return list(values.values()) if isinstance(values, Mapping) else list(values)
