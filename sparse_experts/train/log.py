"""What a run tells while it trains: rows of metrics.jsonl and TensorBoard, lines on stderr."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from sparse_experts.train import metrics
from sparse_experts.train import workdir as wd
from sparse_experts.train.evaluate import PRIMARY
from sparse_experts.train.optimizer import make_schedule


class Log:
  """Sums over the steps since the last row, and where rows go. One process of several writes.

  changed: keys of the config that a resumed run changed, for its first row. tokens: of one step.
  """

  def __init__(self, workdir: str, config: ConfigDict, step: int, changed: dict[str, list], tokens: int):
    self.done, self.started = step, False
    self._stopwatch = metrics.Stopwatch()
    self._tokens, self._changed, self._schedule = tokens, changed, make_schedule(config)
    self._add, self._dead = jax.jit(metrics.add), metrics.DeadExperts()
    self._pairs, self._logged = None, step
    self._progress = metrics.Progress(config.train.steps)
    self._writers = []
    if jax.process_index() == 0:
      self._writers = [metrics.JsonLines(wd.metrics(workdir), step),
                       metrics.TensorBoard(os.path.join(workdir, "tensorboard"), step)]
    if step:
      self.say(f"resuming {workdir} at step {step}" + (f", changed: {', '.join(changed)}" if changed else ""))

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Compiling is no training time."""
    self.say("compiling the train step")
    yield
    self.started = True
    self._stopwatch.lap()

  @contextlib.contextmanager
  def pause(self, state: Any) -> Iterator[None]:
    """Neither is evaluating or saving `state`, once the steps that make it are done."""
    jax.block_until_ready(state)
    with self._stopwatch:
      yield

  def add(self, pairs: dict[str, Any]) -> None:
    self._pairs = pairs if self._pairs is None else self._add(self._pairs, pairs)
    self.done += 1

  def interval(self) -> dict[str, Any]:
    """A row of the steps since the last one; waits for them."""
    pairs, steps = jax.device_get(self._pairs), self.done - self._logged
    self._seconds_per_step = self._stopwatch.lap() / steps
    row = metrics.reduce(pairs) | self._dead(pairs, steps)
    row["learning_rate"] = float(self._schedule(self.done - 1))
    row["seconds_per_step"] = self._seconds_per_step
    row["tokens_per_second"] = self._tokens / self._seconds_per_step
    if self._changed:
      row["changed"], self._changed = self._changed, {}
    self._pairs, self._logged = None, self.done
    return row

  def write(self, row: dict[str, Any]) -> None:
    for writer in self._writers:
      writer.write(row)
    if self._writers and "loss" in row:
      self._progress.write(row, self._seconds_per_step)
    if self._writers and f"eval/{PRIMARY}" in row:
      self.say(f"step {row['step']}: validation {row[f'eval/{PRIMARY}']:.4f} nats per byte")

  def say(self, text: str) -> None:
    if jax.process_index() == 0:
      self._progress.say(text)

  def close(self) -> None:
    for writer in self._writers:
      writer.close()
