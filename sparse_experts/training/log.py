"""What a run reports while it trains: rows of metrics.jsonl and TensorBoard, lines on stderr."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from sparse_experts import storage, terminal
from sparse_experts.small_files import set_aside
from sparse_experts.tasks import task_of
from sparse_experts.training import metrics
from sparse_experts.training import workdir as wd
from sparse_experts.training.optimizer import make_schedule
from sparse_experts.training.watch import Watch


def say(text: str) -> None:
  """A line on stderr, from one process of several."""
  if jax.process_index() == 0:
    terminal.tell(text)


class Log:
  """Sums over the steps since the last row, and where rows go. One process of several writes.

  changed: keys of the config that a resumed run changed, for the first row of an interval.
  about: of `training.about`, for the first row of all.
  """

  def __init__(self, workdir: str, config: ConfigDict, step: int, changed: dict[str, list],
               about: dict[str, Any]):
    self._task, self._stopwatch = task_of(config), metrics.Stopwatch()
    self.done, self.together = step, 1  # together: seeds that share a step's time
    self._about, self._changed, self._schedule = {"run": about}, changed, make_schedule(config)
    self._tokens, k = about["tokens_per_step"], {name: of["k"] for name, of in about["layers"].items()}
    self._add, self._dead = jax.jit(metrics.add), metrics.DeadExperts()
    self._pairs: dict[str, Any] = {}
    self._logged, self._seconds_per_step = step, 0.0
    self.view: metrics.Progress | Watch = metrics.Progress(config.train.steps, k)
    self._writers: list[metrics.JsonLines | metrics.TensorBoard] = []
    self.trouble: dict[type, str] = {}  # writers whose last row is not on disk
    if jax.process_index() == 0:
      rows = metrics.JsonLines(wd.metrics(workdir), step)
      self._writers = [rows, *self._tensorboard(os.path.join(workdir, "tensorboard"), step)]
      if rows.damage:
        self.say(rows.damage)

  def _tensorboard(self, folder: str, step: int) -> list[metrics.TensorBoard]:
    """Its writer; none where it cannot be, which costs no run."""
    try:
      if storage.exists(folder) and not storage.is_folder(folder):
        self.say(f"{folder} is no folder; kept aside as {set_aside(folder)}")
      return [metrics.TensorBoard(folder, step)]
    except OSError as e:
      self.say(f"{folder} cannot be written ({e.strerror}); training goes on without it")
      return []

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Compiling is no training time."""
    self.say("compiling the train step")
    yield
    self._stopwatch.lap()

  @contextlib.contextmanager
  def pause(self, state: Any) -> Iterator[None]:
    """Neither is evaluating or saving `state`, once the steps that make it are done."""
    jax.block_until_ready(state)
    with self._stopwatch:
      yield

  def add(self, pairs: dict[str, Any]) -> None:
    self._pairs = self._add(self._pairs, pairs) if self._pairs else pairs
    self.done += 1
    self.view.step(self.done)

  def interval(self) -> dict[str, Any]:
    """A row of the steps since the last one; waits for them."""
    pairs, steps = jax.device_get(self._pairs), self.done - self._logged
    self._seconds_per_step = self._stopwatch.lap() / steps
    skipped = int(pairs.pop("skipped")[0])
    row: dict[str, Any] = metrics.reduce(pairs) | metrics.shares(pairs) | self._dead(pairs, steps)
    if skipped:
      row["skipped"] = skipped
    row["learning_rate"] = float(self._schedule(self.done - 1))
    row["seconds_per_step"] = self._seconds_per_step
    if self.together > 1:
      row["seeds_together"] = self.together
    row["tokens_per_second"] = self._tokens / self._seconds_per_step
    if self._changed:
      row["changed"], self._changed = self._changed, {}
    self._pairs, self._logged = {}, self.done
    return row

  def write(self, row: dict[str, Any]) -> None:
    """A full disk costs no step: it is reported once, and rows wait for room."""
    row, self._about = row | self._about, {}
    for writer in self._writers:
      with self._tolerated(writer, row["step"]):
        writer.write(row)
        self.trouble.pop(type(writer), None)
    if self._writers and self._seconds_per_step and ("loss" in row or "skipped" in row):
      self.view.write(row, self._seconds_per_step)
    if self._writers and f"eval/{self._task.primary}" in row:
      self.say(f"step {row['step']}: validation {self._task.figure(row, 'eval/')}")

  def flush(self) -> None:
    """Puts the rows so far on the disk: before a checkpoint, and at the end."""
    for writer in self._writers:
      with self._tolerated(writer, self.done):
        writer.flush()

  @contextlib.contextmanager
  def _tolerated(self, writer: metrics.JsonLines | metrics.TensorBoard, step: int) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      if type(writer) not in self.trouble:
        self.say(f"a row of step {step} could not be written ({e.strerror}); training goes on")
      self.trouble[type(writer)] = str(e)

  def say(self, text: str) -> None:
    if jax.process_index() == 0:
      self.view.say(terminal.escaped(text))

  def close(self) -> None:
    for writer in self._writers:
      with contextlib.suppress(OSError):  # reported when the row was lost
        writer.close()
