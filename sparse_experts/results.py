"""Reads the folder of a run without jax: its config, its rows of metrics, and how it ended."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import statistics
from collections.abc import Mapping
from typing import Any

from sparse_experts import storage
from sparse_experts.config import ConfigDict, read_config
from sparse_experts.small_files import Damaged, read_bytes, read_json
from sparse_experts.tasks import task_of

FINAL = "eval/final/"
_RESTORE = "restore it, or run the same `train` command again, which goes on with what is left"


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
  """One run. `diverged` says why there is no final figure; empty if there is one, or none yet."""

  workdir: str
  config: ConfigDict
  rows: tuple[dict[str, Any], ...]  # of metrics.jsonl
  diverged: str

  @property
  def seed(self) -> int:
    return self.config.train.seed

  @property
  def last(self) -> dict[str, Any]:
    return self.rows[-1] if self.rows else {}

  @functools.cached_property
  def final(self) -> dict[str, float]:
    """Figures of the evaluation after the last step, by name; empty before it."""
    if self.last.get("step") != self.config.train.steps:
      return {}
    return {k.removeprefix(FINAL): v for k, v in self.last.items()
            if k.startswith(FINAL) and isinstance(v, int | float)}

  @property
  def finished(self) -> bool:
    """Whether the run is complete: it has its final figure, or it diverged."""
    return bool(self.final or self.diverged)

  @property
  def primary(self) -> float | None:
    """The primary figure of the final evaluation; None of a run that diverged or is not finished."""
    return None if self.diverged else self.final.get(task_of(self.config).primary)

  @property
  def step_seconds(self) -> float | None:
    """Median over the logged intervals: the first ones of a process may be slow."""
    seconds = [own_seconds(row) for row in self.rows if "seconds_per_step" in row]
    return statistics.median(seconds) if seconds else None


def read_result(workdir: str) -> Result:
  """The run in `workdir`, finished or not."""
  return make_result(workdir, read_config(workdir), tuple(_rows(os.path.join(workdir, "metrics.jsonl"))))


def make_result(workdir: str, config: ConfigDict, rows: tuple[dict[str, Any], ...]) -> Result:
  """A run of rows that were read already; its last one is enough for its final figures."""
  result = Result(workdir, config, rows, "")
  value = result.final.get(task_of(config).primary, 0.0)
  diverged = f"the final loss is {value}" if not math.isfinite(value) else ""
  return dataclasses.replace(result, diverged=diverged if result.final else _verdict(workdir))


def kept_checkpoints(workdir: str) -> dict[int, int]:
  """{step: a checksum of all that was saved} of the whole checkpoints, in order of their steps."""
  folder, found = os.path.join(workdir, "checkpoints"), {}
  for name in storage.names(folder) if storage.is_folder(folder) else ():
    meta = os.path.join(folder, name, "meta", "metadata")
    # What is being written or removed, and what is set aside, is none.
    with contextlib.suppress(OSError, ValueError, KeyError):
      found[int(name)] = read_json(meta, "restore it")["check"]
  return dict(sorted(found.items()))


def own_seconds(row: dict[str, Any]) -> float:
  """Seconds of a step of this run: seeds that were trained together share the time in equal parts."""
  return row["seconds_per_step"] / row.get("seeds_together", 1)


def layers_of(row: Mapping[str, Any]) -> list[str]:
  """The sparse layers whose training a row tells of."""
  loads = [k for k in row if k.startswith("router/") and k.endswith("/load_max_mean")]
  return sorted(k.split("/", 1)[1].rsplit("/", 1)[0] for k in loads)


def keep_verdict(workdir: str, why: str) -> None:
  """Notes in the folder that the run diverged: it counts as finished and is not trained again."""
  storage.write_json(os.path.join(workdir, "diverged.json"), {"why": why})


def _verdict(workdir: str) -> str:
  path, way_out = os.path.join(workdir, "diverged.json"), "remove it, and the run goes on"
  try:
    why = read_json(path, way_out).get("why")
  except FileNotFoundError:
    return ""
  if not isinstance(why, str) or not why:
    raise Damaged(f"{path} does not say why; {way_out}")
  return why


def parse_row(line: bytes) -> dict[str, Any] | None:
  """The row in a line of metrics.jsonl; None for what is none, such as a line cut off by a kill."""
  try:
    row = json.loads(line.decode()) if line.endswith(b"\n") else None
  except (ValueError, RecursionError):
    return None
  return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _rows(path: str) -> list[dict[str, Any]]:
  """Whole lines; the last one may have been cut off by a kill."""
  rows = [parse_row(line) for line in read_lines(path) if line.endswith(b"\n")]
  found = [row for row in rows if row is not None]
  if len(found) < len(rows):
    raise Damaged(f"{path}: line {rows.index(None) + 1} is damaged; {_RESTORE}")
  return found


def read_lines(path: str) -> list[bytes]:
  """The lines of metrics.jsonl; none without it. Damaged for a folder of that name."""
  return storage.steadily(path, lambda parts: b"".join(
      read_bytes(part, _RESTORE) for part in parts).splitlines(keepends=True), [])
