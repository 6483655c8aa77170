"""From (sum, count) pairs to numbers, and from numbers to metrics.jsonl, TensorBoard and the terminal."""

import collections
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.proto.summary_pb2 import Summary

from sparse_experts import storage, terminal
from sparse_experts.results import layers_of, parse_row, read_lines
from sparse_experts.small_files import Damaged, set_aside

DEAD_WINDOW = 100  # steps
_LARGE = 2**20  # bytes of an events file
MOST_SHARES = 64  # of a layer's load in a row


def reduce(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
  """Numbers of flat pairs; a layer's `load` becomes `load_max_mean`, the fullest expert over the mean one,
  `load_cv`, deviation over mean of the experts, and `effective_share`, exp(entropy) over their number.

  Shares and means without anything counted are left out rather than reported as zero.
  """
  numbers = {}
  for name, (total, count) in pairs.items():
    total, count = np.asarray(total, np.float64), float(count)
    if name.endswith("/load"):
      if total.sum() > 0:
        numbers[f"{name}_max_mean"] = float(total.max() / total.mean())
        numbers[f"{name}_cv"] = float(total.std() / total.mean())
        numbers[f"{name.removesuffix('load')}effective_share"] = effective_share(total)
    elif count > 0:
      numbers[name] = float(total / count)
  return numbers


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """Pairs of two batches or steps as those of both; of no batch {}."""
  return {k: (a[k][0] + b[k][0], a[k][1] + b[k][1]) for k in b} if a else dict(b)


def shares(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, list[float]]:
  """{"router/<layer>/load": each expert's share of the valid assignments, to four digits}.

  Of more than MOST_SHARES experts: of equal blocks of neighbours, as many blocks as fit and divide E. A layer
  without assignments is left out.
  """
  loads = {name: np.asarray(pair[0], np.float64) for name, pair in pairs.items() if name.endswith("/load")}
  return {name: [float(f"{share:.4g}") for share in in_blocks(load_E) / load_E.sum()]
          for name, load_E in loads.items() if load_E.sum() > 0}


def in_blocks(load_E: np.ndarray) -> np.ndarray:
  """Sums over blocks of neighbours: the largest number of blocks up to MOST_SHARES that divides E."""
  blocks = next(n for n in range(min(len(load_E), MOST_SHARES), 0, -1) if len(load_E) % n == 0)
  return load_E.reshape(blocks, -1).sum(1)


def effective_share(load_E: np.ndarray) -> float:
  """exp(entropy of the load) / E: 1 when even, 1/E when one expert takes all."""
  share_E = load_E[load_E > 0] / load_E.sum()
  return float(np.exp(-(share_E * np.log(share_E)).sum()) / len(load_E))


def dead_experts(load_E: np.ndarray) -> int:
  """How many experts got less than 1/(10 E) of the assignments."""
  load_E = np.asarray(load_E, np.float64)
  return int((load_E < load_E.sum() / (10 * len(load_E))).sum())


class DeadExperts:
  """Counts dead experts per layer over the last `window` steps, from the loads of whole log intervals."""

  def __init__(self, window: int = DEAD_WINDOW):
    self._window = window
    self._intervals: collections.deque[tuple[int, dict[str, np.ndarray]]] = collections.deque()

  def __call__(self, pairs: Mapping[str, Any], steps: int) -> dict[str, float]:
    """{"router/<layer>/dead": count}, of pairs summed over `steps` steps and the intervals before."""
    loads = {k.removesuffix("load"): np.asarray(v[0]) for k, v in pairs.items() if k.endswith("/load")}
    self._intervals.append((steps, loads))
    while sum(n for n, _ in self._intervals) - self._intervals[0][0] >= self._window:
      self._intervals.popleft()
    return {f"{layer}dead": dead_experts(np.sum([then[layer] for _, then in self._intervals], 0))
            for layer in loads}


class JsonLines:
  """metrics.jsonl: one object per row, in order of steps, also after a run was killed or a disk was full.

  Rows before `flush` survive a power cut too.
  """

  def __init__(self, path: str, step: int):
    """Drops what was written after `step`, the step that training resumes from.

    A damaged file is kept aside, which `damage` says, and the rows that are left are written anew.
    """
    lines, self.damage = _rows_until(path, step)
    if self.damage:
      self.damage += f"; kept aside as {set_aside(storage.whole_log(path))}, the other rows stay"
    self._log = storage.open_log(path, b"".join(lines))

  def write(self, row: Mapping[str, Any]) -> None:
    """All of the row or nothing of it; a row that could not be written is written before the next one."""
    self._log.write(json.dumps(row, allow_nan=True).encode() + b"\n")

  def flush(self) -> None:
    """Puts the rows on the disk, or in the store."""
    self._log.flush()

  def close(self) -> None:
    self._log.close()


def _rows_until(path: str, step: int) -> tuple[list[bytes], str]:
  """(the lines of rows up to `step`, what is wrong with the file; a line cut off by a kill is not)."""
  try:
    lines = read_lines(path)
  except Damaged as e:
    return [], str(e).partition(";")[0]
  rows = [parse_row(line) for line in lines]
  bad = sum(row is None and line.endswith(b"\n") for line, row in zip(lines, rows, strict=True))
  kept = [line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step]
  return kept, f"{path} has {bad} damaged line{'s' * (bad > 1)}" if bad else ""


class TensorBoard:
  """The same numbers as event files.

  Not through `SummaryWriter`, whose thread dies of a full disk and leaves the run waiting for it.
  """

  def __init__(self, folder: str, step: int):
    self._outbox = storage.Outbox(folder)
    self._writer = self._begin()
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # older files are void from here on
    self._event(step + 1, session_log=start)

  def _begin(self) -> EventsWriter:
    return EventsWriter(os.path.join(self._outbox.folder, "events"))

  def _event(self, step: int, **content: Any) -> None:
    self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

  def write(self, row: Mapping[str, Any]) -> None:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()
              if isinstance(value, int | float) and name != "step"]
    self._event(row["step"], summary=Summary(value=values))
    self._writer.flush()

  def flush(self) -> None:
    """Event files are a copy of the rows; the system writes them when it likes, a store gets them now."""
    if self._outbox.ship() > _LARGE:  # another file: this one is not sent again
      self._writer.close()
      self._outbox.empty()
      self._writer = self._begin()

  def close(self) -> None:
    self._writer.close()
    self._outbox.close()


class Progress:
  """A line on stderr per message and per logged row: loss, speed, time left, how sparse layers spread tokens.

  steps: of the whole run. k: of each sparse layer; experts per token are shown where they are not k.
  """

  def __init__(self, steps: int, k: Mapping[str, int], stream: TextIO | None = None):
    self.steps, self.k, self._stream = steps, k, stream or sys.stderr

  def step(self, done: int) -> None:
    """A step more is done: no line."""

  def say(self, text: str) -> None:
    terminal.tell(text, self._stream)

  def write(self, row: Mapping[str, Any], seconds_per_step: float) -> None:
    left = max(self.steps - row["step"], 0) * seconds_per_step
    skipped = f" ({row['skipped']} updates skipped)" if "skipped" in row else ""
    parts = [f"step {row['step']}/{self.steps}", f"loss {row.get('loss', float('nan')):.4f}{skipped}",
             f"{row['tokens_per_second']:,.0f} tokens/s", f"{clock(left)} left"]
    for layer in layers_of(row):
      get = lambda name, layer=layer: row.get(f"router/{layer}/{name}", float("nan"))
      dead = f" dead {get('dead'):.0f}" if get("dead") > 0 else ""
      mean = get("experts_per_token")
      experts = f" experts/token {mean:.2f}" if abs(mean - self.k[layer]) >= 0.005 else ""
      parts.append(f"{layer} load {get('load_max_mean'):.2f} dropped {get('dropped'):.1%}"
                   f" entropy {get('entropy'):.2f}{experts}{dead}")
    self.say("  ".join(parts))


def clock(seconds: float) -> str:
  """1:02:03, or 2:03."""
  hours, rest = divmod(int(seconds + 0.5), 3600)
  minutes, seconds = divmod(rest, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Stopwatch:
  """Time spent training: evaluation and saving pause it."""

  def __init__(self):
    self._start, self._paused = time.perf_counter(), 0.0

  def __enter__(self):
    self._pause = time.perf_counter()

  def __exit__(self, *_):
    self._paused += time.perf_counter() - self._pause

  def lap(self) -> float:
    """Seconds of training since the last lap."""
    now = time.perf_counter()
    seconds = now - self._start - self._paused
    self._start, self._paused = now, 0.0
    return seconds
