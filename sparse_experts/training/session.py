"""Logs, evaluates and saves a run between its steps, and evaluates it at the end.

The loop makes steps and calls the session after each; of seeds trained together, each has its own session.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from sparse_experts.config import ConfigDict
from sparse_experts.data import Dataset
from sparse_experts.errors import UserError
from sparse_experts.full_disk import is_full
from sparse_experts.storage import Lease
from sparse_experts.tasks import task_of
from sparse_experts.training import evaluate, metrics
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.countdown import Countdown
from sparse_experts.training.log import Log
from sparse_experts.training.state import TrainState


class NonFinite(UserError):
  """A loss or a gradient that is not finite ended the run at `step`."""

  def __init__(self, step: int, saved: int, where: str = ""):
    self.step, self.saved = step, saved
    super().__init__(
        f"step {step}: the loss or its gradient is not finite{where and f', {where}'}; the last good "
        f"checkpoint is step {saved}. Set train.skip_nonfinite=true to leave such updates out, or begin anew "
        "with a smaller optimizer.learning_rate")


class Session:
  """`after(state, pairs)` once per step; `finish(state, asked)` after the last, `stop(state)` before it."""

  def __init__(self, config: ConfigDict, log: Log, checkpoints: Checkpoints, evaluator: evaluate.Evaluator,
               valid_data: Dataset, meta: dict[str, str], lease: Lease | None = None):
    """meta: of `identity.describe`, for checkpoints. lease: of the folder; one process of several has it."""
    self.config, self.log, self._task = config, log, task_of(config)
    self._checkpoints, self._evaluator, self._valid_data = checkpoints, evaluator, valid_data
    self._lease, self._meta = lease, meta
    self._saved = log.done  # the last step handed to be saved
    self._skipped = None  # of the previous step, which is done when the next one runs

  @property
  def complete(self) -> bool:
    return self.log.done >= self.config.train.steps

  def due(self, step: int) -> bool:
    """Whether `after` needs the state when `step` steps are done."""
    t = self.config.train
    return step >= t.steps or any(step % n == 0 for n in (t.log_every, t.eval_every, t.checkpoint_every))

  def after(self, state: TrainState | None, pairs: dict[str, Any]) -> None:
    """Counts the step and logs, evaluates and saves what is due; `state` may be None if nothing is."""
    self.log.add(pairs)
    t, done = self.config.train, self.log.done
    self._refuse_nonfinite(pairs)
    if not self.due(done):
      return
    assert state is not None  # `due` says so beforehand
    eval_loss = None
    row = self.log.interval() if done % t.log_every == 0 or self.complete else {}
    if done % t.eval_every == 0 or self.complete:
      with self.log.pause(state):
        numbers = self._evaluator(state.params, state.buffers, self.config.eval.train_windows)
      eval_loss = numbers.get(self._task.primary)  # validation data may hold no target that it counts
      row |= {f"eval/{k}": v for k, v in numbers.items()}
    if row:
      self.log.write({"step": done} | row)
    if done % t.checkpoint_every == 0 or self.complete:
      self._save(state, eval_loss)
    else:
      self._report(self._checkpoints.trouble())

  def stop(self, state: TrainState, why: str) -> None:
    """Saves before the last step; the same command resumes from here."""
    if self._checkpoints.wait() or self._checkpoints.lost or self._saved != self.log.done:
      self._save(state, None)
    self._settle()
    self.log.say(f"{why}: saved at step {self.log.done}; the same command resumes from there")

  def finish(self, state: TrainState, asked: Callable[[int], str | None]) -> str | None:
    """The primary figure of all that the task evaluates, next to its baselines.

    asked: `Interrupt.asked`; why the evaluation was stopped is returned, after which `finish` begins anew.
    """
    records = self._task.evaluated_records(self._valid_data)
    self.log.say(f"evaluating on {records:,} validation records")
    countdown = Countdown(records, self.log.say).start("evaluated")
    pairs: dict[str, Any] = {}
    batches = self._evaluator.sums(state.params, state.buffers, records, final=True)
    for number, (done, sums) in enumerate(batches, start=1):
      pairs = metrics.add(pairs, sums)
      countdown(done)
      if why := asked(self.log.done + number):  # processes agree on a number that only rises
        self._settle()
        self.log.say(f"{why}: stopped in the final evaluation, step {self.log.done} is saved; the same "
                     "command evaluates it again")
        return why
    numbers = evaluate.report(self._task, pairs)
    numbers |= self._task.baselines(self._valid_data, records)
    self._settle()
    self.log.write({"step": self.log.done} | {f"eval/final/{k}": v for k, v in numbers.items()} | {
        "measure": self._task.measure(numbers), "data_fingerprint": self._meta["data_fingerprint"]})
    self.log.flush()
    if self.log.trouble:
      raise UserError(f"the last rows could not be written ({next(iter(self.log.trouble.values()))}); make "
                      "room and run the same command again")
    self.log.say(evaluate.summary(self._task, numbers))
    return None

  def _refuse_nonfinite(self, pairs: dict[str, Any]) -> None:
    """Checks the previous step, and this one if the state is about to be used."""
    if self.config.train.skip_nonfinite:
      return
    done = self.log.done
    checked = [(done - 1, self._skipped), (done, pairs["skipped"][0] if self.due(done) else None)]
    self._skipped = pairs["skipped"][0]
    for step, skipped in checked:
      if skipped is not None and skipped > 0:
        self._checkpoints.wait()
        raise NonFinite(step, self._checkpoints.latest() or 0)

  def _save(self, state: TrainState, eval_loss: float | None) -> None:
    if self._lease:
      self._lease.check()
    with self.log.pause(state):
      self.log.flush()  # first: rows up to a checkpoint are there with it
      self._report(self._checkpoints.save(state, self._meta, eval_loss))
    self._saved = self.log.done

  def _report(self, trouble: str | None) -> None:
    if trouble:
      self.log.say(f"{trouble}; training goes on, the next save will be tried")

  def _settle(self) -> None:
    """Waits for the last save; raises UserError if it failed, as the work since the one before is lost."""
    self._checkpoints.wait()
    if trouble := self._checkpoints.lost:
      from_step = "the last that was saved"
      with contextlib.suppress(UserError):  # of a store that does not tell
        from_step = f"step {self._checkpoints.latest() or 0}"
      way_out = "make room" if is_full(OSError(trouble)) else "mend that"
      raise UserError(f"{trouble}; {way_out} and run the same command again: it resumes from {from_step}")
