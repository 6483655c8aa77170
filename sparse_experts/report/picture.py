"""A figure with the project's style, which moves labels that cover each other before it is shown or saved."""

import io
import itertools
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator

from sparse_experts.report import labels

STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "axes.grid": True, "grid.color": "0.88",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "0.35", "hatch.linewidth": 0.6, "figure.dpi": 110, "savefig.dpi": 110,
    "text.parse_math": False}  # a $ in a name is a $


class Picture(Figure):
  """Not of pyplot, which would choose a window system; a notebook shows it if it ends a cell."""

  def __init__(self, **options):
    super().__init__(**options)
    FigureCanvasAgg(self)
    self.looks: dict[str, dict] = {}  # of the arms
    self._named: list[tuple[Axes, Annotation, tuple[float, float]]] = []

  def name_point(self, axes: Axes, name: str, at: tuple[float, float]) -> None:
    """A label for the point, which `arrange` moves to where there is room."""
    line = dict(arrowstyle="-", color="0.5", lw=0.6, shrinkA=0, shrinkB=3)
    label = axes.annotate(name, at, xytext=(0, 0), textcoords="offset points", fontsize=7, arrowprops=line,
                          annotation_clip=False)
    label.set_in_layout(False)
    self._named.append((axes, label, at))

  def arrange(self) -> None:
    """Breaks long names of axes, thins or turns labels of ticks that overlap, places the names of points."""
    with matplotlib.rc_context(STYLE):
      self.draw_without_rendering()
      for axes in self.axes:
        _fit_labels(axes)
      self.draw_without_rendering()
      crowded = {axis for axes in self.axes for axis in (axes.xaxis, axes.yaxis)}
      while crowded := {axis for axis in crowded if _overlap(_tick_labels(axis)) and _loosen(axis)}:
        self.draw_without_rendering()
      for axes in dict.fromkeys(axes for axes, *_ in self._named):
        self._place_names(axes)

  def _place_names(self, axes: Axes) -> None:
    names = [(label, at) for of, label, at in self._named if of is axes]
    points = [(float(x), float(y)) for x, y in axes.transData.transform([at for _, at in names])]
    boxes = [_box(label) for label, _ in names]
    sizes = [(right - left, top - bottom) for left, bottom, right, top in boxes]
    dots = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    placed = labels.place(points, sizes, _extents(axes), dots)
    for (label, _), (x, y), box in zip(names, points, placed):
      label.set_position(((box[0] - x) * 72 / self.dpi, (box[1] - y) * 72 / self.dpi))
      label.set(ha="left", va="bottom")
      if label.arrow_patch:
        label.arrow_patch.set_visible(labels.needs_leader(box, (x, y)))

  def labelled(self) -> list[tuple[str, labels.Box]]:
    """Every visible text with its box in pixels, once the picture was arranged."""
    found: list[Text] = list(self.texts)
    for axes in self.axes:
      found += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
      found += [*_tick_labels(axes.xaxis), *_tick_labels(axes.yaxis)]
    for legend in (*self.legends, *(axes.get_legend() for axes in self.axes)):
      found += legend.get_texts() if legend else []
    return [(text.get_text(), _box(text)) for text in found if text.get_visible() and text.get_text().strip()]

  def overlaps(self) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other."""
    return [(a, b) for (a, box_a), (b, box_b) in itertools.combinations(self.labelled(), 2)
            if labels.overlap(box_a, box_b, -0.5)]

  def png(self) -> bytes:
    self.arrange()
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
      self.savefig(out, format="png", pil_kwargs={"optimize": True})
    return out.getvalue()

  _repr_png_ = png


def _extents(artist: Artist) -> labels.Box:
  left, bottom, right, top = map(float, artist.get_window_extent().extents)
  return left, bottom, right, top


def _box(text: Text) -> labels.Box:
  """Of the text alone, without an annotation's line."""
  left, bottom, right, top = map(float, Text.get_window_extent(text).extents)
  return left, bottom, right, top


def _fit_labels(axes: Axes) -> None:
  """Breaks names of axes that are longer than the axis, and titles wider than the panel, or shrinks them."""
  left, bottom, right, top = _extents(axes)
  for text, i, room in ((axes.yaxis.label, 1, top - bottom), (axes.xaxis.label, 0, right - left),
                        (axes.title, 0, 1.1 * (right - left))):
    length = lambda text=text, i=i: _box(text)[i + 2] - _box(text)[i]
    if length() > room and "\n" not in text.get_text():
      text.set_text(text.get_text().replace(", ", ",\n").replace("; ", ";\n"))
    for size in (8, 7, 6):
      if length() > room:
        text.set_fontsize(size)


def _tick_labels(axis: Axis) -> list[Text]:
  """Those within the limits: matplotlib also has some outside, which it does not draw."""
  low, high = sorted(axis.get_view_interval())
  texts = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
  return [text for text in texts if text.get_visible() and text.get_text()]


def _overlap(texts: list[Text]) -> bool:
  boxes = [_box(text) for text in texts]
  return any(labels.overlap(a, b, 1) for a, b in itertools.combinations(boxes, 2))


def _loosen(axis: Axis) -> bool:
  """Fewer numbers, or names turned upright or in smaller type; False if nothing is left to try."""
  locator, text = axis.get_major_locator(), axis.get_majorticklabels()[0]
  if isinstance(locator, MaxNLocator):
    number = len(_tick_labels(axis)) - 2
    locator.set_params(nbins=max(number, 1))
    return number > 1
  if isinstance(axis, XAxis) and text.get_rotation() == 0:
    axis.set_tick_params(labelrotation=90)
    return True
  size = float(text.get_fontsize()) - 1
  axis.set_tick_params(labelsize=size)
  return size > 4
