"""Seeds of one config trained as one program: the train step vmapped over stacked states.

Each seed has its own work directory with rows, evaluations and checkpoints, and can be resumed alone or
together with others. The only difference to single runs is the order of sums.

It helps if one small run leaves a device idle. On two CPU cores it does not help: per seed a step took 1.6
times as long as alone for the smoke config (the grouped matmul's loops run as long as the longest seed
needs), 1.2 times with `model.dispatch=scatter` and 1.4 times for the dense twin. Measured as ms/step of
the tables of `sweep` on these three arms, seeds 0 to 3, `seeds_together=4` against 1, with
--config.train.steps=12 --config.train.log_every=1, jax 0.10.2, on a shared machine: the direction
is certain, the second digit is not.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparse_experts import partitioning
from sparse_experts.training import workdir as wd
from sparse_experts.training.interrupt import Interrupt
from sparse_experts.training.session import NonFinite, Session
from sparse_experts.training.setup import Setup, set_up
from sparse_experts.training.state import TrainState, shardings
from sparse_experts.training.step import make_train_step

Member = tuple[Setup, TrainState, Session]


def train_seeds(configs: Sequence[ConfigDict], workdirs: Sequence[str],
                diverged: Callable[[str, NonFinite], None]) -> None:
  """Trains configs that differ in their seeds only, on one device, each in its workdir.

  Runs at the same step train together, those that are behind first. One that ends in NonFinite is handed to
  `diverged(workdir, error)` and the others go on. Raises SystemExit after SIGTERM, once all are saved.
  """
  first = set_up(configs[0], workdirs[0])
  setups = [first, *(first.for_seed(c, w) for c, w in zip(configs[1:], workdirs[1:], strict=True))]
  with contextlib.ExitStack() as stack:
    stack.enter_context(partitioning.use(first.mesh))
    interrupt = stack.enter_context(Interrupt())
    by_step: dict[int, list[Member]] = {}
    for setup in setups:
      finished = wd.is_finished(setup.workdir)
      state, session = setup.begin(stack)
      if not session.complete:
        by_step.setdefault(session.log.done, []).append((setup, state, session))
      elif not finished and not _finish([(state, session)], interrupt):
        return
    for step in sorted(by_step):
      if not _together(by_step[step], interrupt, diverged):
        break


def _together(members: Sequence[Member], interrupt: Interrupt,
              diverged: Callable[[str, NonFinite], None]) -> bool:
  """Trains to the last step: True; or False if it was asked to stop and saved all runs."""
  setups, states, sessions = zip(*members, strict=True)
  one, n = setups[0], len(setups)
  single = make_train_step(one.model, one.optimizer, one.config)
  stacked = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  unstacked = lambda tree: [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(n)]

  def joint(state, batches, keys):
    state, pairs = jax.vmap(single)(state, stacked(batches), keys)
    return state, unstacked(pairs)

  split = jax.jit(unstacked, out_shardings=[shardings(one.abstract)] * n)
  with contextlib.ExitStack() as stack:
    feeds = [s.feed(session.log.done, stack) for s, session in zip(setups, sessions)]
    keys, state = jnp.stack([s.key for s in setups]), jax.jit(stacked)(states)
    del states
    live = dict(enumerate(sessions))
    for session in sessions:
      session.log.together = n
    batches = [next(feed) for feed in feeds]
    with _all(session.log.compiling() for session in sessions):
      step = jax.jit(joint, donate_argnums=0).lower(state, batches, keys).compile()
    interrupt.begin()
    while True:
      state, pairs = step(state, batches, keys)
      any_live = next(iter(live.values()))
      done, due = any_live.log.done + 1, any_live.due(any_live.log.done + 1)
      if due:
        jax.block_until_ready(state)  # so that a session's wait is not counted as training time of the others
      each: Sequence[Any] = split(state) if due else [None] * n
      for i, session in list(live.items()):
        with _all(other.log.pause(None) for j, other in live.items() if due and j != i):
          try:
            session.after(each[i], pairs[i])
          except NonFinite as e:
            diverged(setups[i].workdir, e)
            del live[i]
      if not live or done >= one.config.train.steps:
        return _finish([(each[i], session) for i, session in live.items()], interrupt)
      if why := interrupt.asked(done):
        each = split(state)
        for i, session in live.items():
          session.stop(each[i], why)
        if why == "SIGINT":
          raise KeyboardInterrupt
        return False
      batches = [next(feed) for feed in feeds]


def _finish(ended: Iterable[tuple[TrainState, Session]], interrupt: Interrupt) -> bool:
  """Evaluates runs at their last step: True; or False if it was asked to stop."""
  for state, session in ended:
    if why := session.finish(state, interrupt.asked):
      if why == "SIGINT":
        raise KeyboardInterrupt
      return False
  interrupt.end()
  return True


@contextlib.contextmanager
def _all(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
  with contextlib.ExitStack() as stack:
    for context in contexts:
      stack.enter_context(context)
    yield


def seeds_that_fit(config: ConfigDict, workdir: str, most: int) -> int:
  """How many seeds to train together: 1 on a CPU or a mesh, else as many as the device has memory for.

  From the compiler's figure for one step; nine tenths of the memory may be used.
  """
  device = jax.devices()[0]
  limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
  if not limit or config.mesh.data * config.mesh.expert * config.mesh.model > 1:
    return 1
  return max(1, min(most, int(0.9 * limit) // step_bytes(config, workdir)))


def step_bytes(config: ConfigDict, workdir: str) -> int:
  """Memory of one run's train step: state, batch and temporaries."""
  s = set_up(config, workdir)
  with partitioning.use(s.mesh), contextlib.ExitStack() as stack:
    step = jax.jit(make_train_step(s.model, s.optimizer, config), donate_argnums=0)
    memory = step.lower(s.abstract, next(s.feed(0, stack)), s.key).compile().memory_analysis()
  assert memory is not None  # every backend with memory statistics has it
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
          - memory.alias_size_in_bytes)
