"""A run as it is read for a page: its config, its log and how it ended, also of another version. No jax."""

import dataclasses
import os
from typing import Any

from ml_collections import ConfigDict

from sparse_experts.report import config_table, log
from sparse_experts.results import Result, layers_of, make_result
from sparse_experts.tasks import Task, task_of


@dataclasses.dataclass(frozen=True)
class Read:
  """unknown: keys of config.json that this version lacks; missing: keys that config.json lacks."""

  config: ConfigDict
  unknown: dict[str, Any]
  missing: list[str]
  log: log.Log
  result: Result

  @property
  def task(self) -> Task:
    return task_of(self.config)

  @property
  def loss_unit(self) -> str:
    """Of `loss`, in training and in `eval/loss`."""
    return "nats per target" if self.task.token_targets else self.task.unit

  @property
  def state(self) -> str:
    if self.result.diverged:
      return f"diverged: {self.result.diverged}"
    if self.result.final:
      return "finished"
    return "going on, or stopped" if self.log.rows else "no step logged yet"


def _routed(row: dict[str, Any], config: ConfigDict) -> list[dict[str, Any]]:
  """The row that `analysis.balance` reads, unless its figures are no numbers or the config has no experts."""
  figures = [row.get(f"router/{layer}/{name}", 0) for layer in layers_of(row)
             for name in ("dropped", "dead", "load_max_mean")]
  whole = all(map(log.is_number, figures)) and all(config_table.experts_of(config, layer)[0]
                                                   for layer in layers_of(row))
  return [row] if row and whole else []


def read(workdir: str, points: int = log.POINTS) -> Read:
  """The run in `workdir`, going on or finished; its log as at most `points` points."""
  config, unknown, missing = config_table.read(workdir)
  found = log.read(os.path.join(workdir, "metrics.jsonl"), ("loss", task_of(config).primary), points)
  result = make_result(workdir, config, (*_routed(found.routed, config), *filter(None, [found.last])))
  return Read(config, unknown, missing, found, result)
