"""Trains a config in a work directory, or resumes from its last checkpoint.

The state after step s and the records from s * B on determine everything that follows: a run that was
killed and resumed ends with the same bits as an uninterrupted one.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from sparse_experts import interrupts, partitioning
from sparse_experts.config import ConfigDict
from sparse_experts.models import Batch
from sparse_experts.moe import Router
from sparse_experts.profiling.profile import Profiler
from sparse_experts.training import nonfinite
from sparse_experts.training import workdir as wd
from sparse_experts.training.interrupt import Interrupt
from sparse_experts.training.run import Run
from sparse_experts.training.session import NonFinite, Session
from sparse_experts.training.setup import Setup, set_up
from sparse_experts.training.state import TrainState
from sparse_experts.training.step import jit_train_step
from sparse_experts.training.watch import watching


def train(config: ConfigDict, workdir: str, *, router: Router | None = None, data: Any = None,
          profile: int = 0, watch: bool = False, notes: Sequence[str] = ()) -> Run:
  """Trains to `config.train.steps` and returns the run, which is finished.

  Raises KeyboardInterrupt after Ctrl-C, and SystemExit (143, 129) after SIGTERM and SIGHUP, once the state is
  saved: the same call resumes.

  router: an instance that every sparse layer starts from, instead of `config.model.router`.
  data: documents (`__len__`, `__getitem__`) or an object with `.train` and `.valid`, instead of the source.
  profile: number of steps to record after the warm-up, as a trace in `workdir`/profile and a table on stderr.
  watch: on a terminal, a view that redraws instead of a line per row.
  notes: lines about the config, said before the first step.
  """
  interrupts.check()
  workdir = os.fspath(workdir)
  s = set_up(config, workdir, router, data)
  interrupts.check()
  config = s.config
  with contextlib.ExitStack() as stack:
    stack.enter_context(partitioning.use(s.mesh))
    interrupt = stack.enter_context(Interrupt())
    finished = wd.is_finished(workdir)
    state, session = s.begin(stack)
    for note in notes:
      session.log.say(note)
    first = session.log.done
    profiler = Profiler(profile, os.path.join(workdir, "profile"), config, first)
    stack.callback(profiler.close)
    if session.complete and finished:
      session.log.say(f"{workdir} is already finished: step {first} of {config.train.steps}")
    elif session.complete:
      _finish(session, state, interrupt)
    else:
      if watch:
        stack.enter_context(watching(session.log, workdir))
      state = _steps(s, state, s.feed(first, stack), session, interrupt, profiler)
  return Run(config, int(state.step), state.params, state.buffers, s.tokenizer, s.mesh,
             s.source.fingerprint, router)


def _steps(s: Setup, state: TrainState, feed: Iterator[Batch], session: Session, interrupt: Interrupt,
           profiler: Profiler) -> TrainState:
  """Trains to the last step, or until asked to stop: then it saves; `Interrupt` raises what ends `train`."""
  key = s.key
  with session.log.compiling():
    batch = before = next(feed)
    program = jit_train_step(s.model, s.optimizer, s.config, s.abstract, s.mesh)
    step = program.lower(state, batch, key).compile()
  interrupt.begin()
  while True:
    state, pairs = profiler(step, (state, batch, key), session.log)
    try:
      session.after(state, pairs)
    except NonFinite as e:
      bad = batch if e.step == session.log.done else before
      where = nonfinite.find(s.model, state.params, state.buffers, bad, jax.random.fold_in(key, e.step - 1))
      raise NonFinite(e.step, e.saved, where) from None
    if session.complete:
      _finish(session, state, interrupt)
      return state
    if why := interrupt.asked(session.log.done):
      session.stop(state, why)
      if why == "SIGINT":
        raise KeyboardInterrupt
      return state
    try:
      before, batch = batch, next(feed)
    except Exception:
      if jax.process_count() == 1:  # several processes could not agree on a step
        session.stop(state, "no more data")
      raise


def _finish(session: Session, state: TrainState, interrupt: Interrupt) -> None:
  """Evaluates the last step, or until asked to stop; Ctrl-C then raises KeyboardInterrupt."""
  if session.finish(state, interrupt.asked) == "SIGINT":
    raise KeyboardInterrupt
  interrupt.end()
