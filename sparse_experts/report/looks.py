"""What tells arms apart in a picture, also without colour: a colour, a marker, a line style, a hatching."""

from collections.abc import Iterable
from typing import Any

from sparse_experts.report.colours import colours

Look = dict[str, Any]  # keywords of matplotlib

MARKERS = "os^DvPX<>ph"  # 11: with the 6 lines, 66 arms differ
LINES: tuple = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
PLAIN: Look = dict(color="0.3", marker="o")  # of rows that are no arms


def looks(names: Iterable[str]) -> dict[str, Look]:
  """{name: its colour, which `colours` keeps from picture to picture, and a marker and line style}."""
  return {name: dict(color=colour, marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i % len(LINES)])
          for i, (name, colour) in enumerate(colours(names).items())}


def dots(look: Look) -> Look:
  """Points without a line."""
  return look | dict(linestyle="none", ms=5, mec="white", mew=0.3, zorder=3)


def marked(look: Look, n: int) -> Look:
  """A line with about six markers."""
  return look | dict(lw=1.4, ms=4.5, mec="white", mew=0.3, markevery=max(n // 6, 1))
