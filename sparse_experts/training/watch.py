"""`train --watch`: a view of the run on the terminal that redraws, in the place of a line per row."""

import collections
import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparse_experts import terminal
from sparse_experts.results import layers_of, read_result
from sparse_experts.training.metrics import MOST_SHARES, clock

BLOCKS = "▁▂▃▄▅▆▇█"
FAINT = "·"  # in the place of a bar: under a tenth of an even share, or nothing to draw
LOSSES = 1000  # points of the curve
MESSAGES = 30  # lines
HEAD = 3  # lines: progress, loss, the titles of the columns


class Log(Protocol):
  """What is needed of `training.log.Log`."""

  done: int
  view: Any


@contextlib.contextmanager
def watching(log: Log, workdir: str) -> Iterator[None]:
  """Draws what `log` reports on the terminal until the block ends; the last view remains.

  Where stderr is no terminal, and in the other processes of several, `log` goes on as it was.
  """
  output: Any = terminal.Output(sys.stderr, forgiving=True, escape=False)
  console, lines = Console(file=output), log.view
  if (jax.process_index() or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
      or not console.encoding.startswith("utf")):
    yield
    return
  watch = Watch(lines.steps, lines.k, read_result(workdir).rows)
  watch.step(log.done)
  with Live(watch, console=console, vertical_overflow="crop"):
    log.view = watch
    try:
      yield
    finally:
      log.view, watch.ended = lines, True


class Watch:
  """Progress, loss, the load of each sparse layer's experts, and the latest messages; a rich renderable.

  steps, k: as of `Progress`, in whose place it stands. rows: those of the run so far. Layers that do not fit
  the height are left out, the most even ones first; experts that do not fit the width share bars with
  their neighbours.
  """

  def __init__(self, steps: int, k: Mapping[str, int], rows: Sequence[Mapping[str, Any]] = ()):
    self.steps, self.k, self.ended = steps, k, False  # ended: no need to fit a height any more
    self._done, self._seconds = 0, math.nan
    self._row: Mapping[str, Any] = {}
    self._losses: list[float] = []
    self._messages: collections.deque[str] = collections.deque(maxlen=MESSAGES)
    for row in rows:
      self._keep_loss(row)

  def step(self, done: int) -> None:
    """A step more is done."""
    self._done = done

  def write(self, row: Mapping[str, Any], seconds_per_step: float) -> None:
    self._row, self._seconds = row, seconds_per_step
    self._keep_loss(row)

  def say(self, text: str) -> None:
    self._messages.extend(text.splitlines())

  def _keep_loss(self, row: Mapping[str, Any]) -> None:
    if "loss" in row:
      self._losses.append(row["loss"])
    if len(self._losses) > 2 * LOSSES:
      self._losses = means(self._losses, LOSSES)

  def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
    messages, layers = list(self._messages), self._layers()
    room = math.inf if self.ended else options.size.height - HEAD
    shown = layers if len(layers) + min(len(messages), 3) <= room else layers[:max(int(room) - 4, 1)]
    left_out = layers[len(shown):]
    yield self._progress()
    yield self._curve(options.max_width)
    if shown:
      yield self._table(sorted(shown))
    if left_out:
      most = self._max_vio(left_out[0])
      yield Text(f"{len(left_out)} more layers with MaxVio up to {most:.2f}", style="dim")
    room -= len(shown) + bool(left_out)
    for line in messages if self.ended else messages[-max(int(room), 1):]:
      yield Text(line, no_wrap=not self.ended, overflow="fold" if self.ended else "ellipsis")

  def _progress(self) -> Table:
    left = (self.steps - self._done) * self._seconds
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    grid.add_row(f"step {self._done}/{self.steps}", ProgressBar(self.steps, self._done),
                 f"{clock(left)} left" if left >= 0 else "")
    return grid

  def _curve(self, width: int) -> Text:
    """The loss, its curve so far between its lowest and its highest, and the speed."""
    if not self._row:
      return Text("")
    skipped = f" ({self._row['skipped']} updates skipped)" if "skipped" in self._row else ""
    loss = f"loss {self._row.get('loss', math.nan):.4f}{skipped} "
    speed = f" {self._row['tokens_per_second']:,.0f} tokens/s"
    curve = bars(means(self._losses, max(width - len(loss) - len(speed), 0)))
    return Text(loss + curve + speed, no_wrap=True, overflow="ellipsis")

  def _layers(self) -> list[str]:
    """Those of the last row, the least even first."""
    return sorted(layers_of(self._row), key=self._max_vio, reverse=True)

  def _max_vio(self, layer: str) -> float:
    return self._row[f"router/{layer}/load_max_mean"] - 1

  def _table(self, layers: Sequence[str]) -> Table:
    get = lambda layer, name: self._row.get(f"router/{layer}/{name}", math.nan)
    columns = {"MaxVio": lambda layer: f"{self._max_vio(layer):.2f}",
               "dropped": lambda layer: f"{get(layer, 'dropped'):.1%}",
               "entropy": lambda layer: f"{get(layer, 'entropy'):.2f}",
               "dead": lambda layer: f"{get(layer, 'dead'):.0f}"}
    if any(abs(get(layer, "experts_per_token") - self.k[layer]) >= 0.005 for layer in layers):
      columns["per token"] = lambda layer: f"{get(layer, 'experts_per_token'):.2f}"
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("layer", no_wrap=True)
    table.add_column("load by expert")
    for title in columns:
      table.add_column(title, justify="right", no_wrap=True)
    for layer in layers:
      texts = (form(layer) for form in columns.values())
      table.add_row(layer, Bars(get(layer, "load")), *("" if "nan" in text else text for text in texts))
    return table


class Bars:
  """The load of a layer: a bar per expert, half as high as the line where it is even."""

  def __init__(self, load: Sequence[float]):
    self._relative = [share * len(load) for share in load]  # 1: an even share

  def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
    return Measurement(min(len(self._relative), 4), min(len(self._relative), MOST_SHARES))

  def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
    relative = means(self._relative, max(options.max_width, 1))
    text = Text(no_wrap=True)
    for value, bar in zip(relative, bars(relative, 0.0, max(2.0, *relative))):
      text.append(*((FAINT, "red") if value < 0.1 else (bar, "yellow" if value > 2 else "")))
    yield text


def bars(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
  """A block per value, as high as it lies between low and high: of the finite values if not given."""
  finite = [x for x in values if math.isfinite(x)]
  if not finite:
    return FAINT * len(values)
  low, high = min(finite) if low is None else low, max(finite) if high is None else high
  scale = (len(BLOCKS) - 1) / max(high - low, 1e-9)
  return "".join(BLOCKS[round((x - low) * scale)] if math.isfinite(x) else FAINT for x in values)


def means(values: Sequence[float], most: int) -> list[float]:
  """The values, or the means of `most` stretches of them."""
  if len(values) <= most:
    return list(values)
  return [float(np.mean(part)) for part in np.array_split(values, most)] if most else []
