"""Times train steps of a config against its dense twin: same data, same optimizer, in the same rounds."""

import contextlib
import os
import tempfile
from typing import Any

import jax

from sparse_experts import partitioning
from sparse_experts.benchmark.timing import interleave
from sparse_experts.config import ConfigDict, dense_twin, seeds
from sparse_experts.training.setup import set_up
from sparse_experts.training.state import TrainState, make_state
from sparse_experts.training.step import jit_train_step


class Steps:
  """A config's train step: each call makes one, always on the run's first batch; the first call compiles."""

  def __init__(self, config: ConfigDict, workdir: str, data: Any = None):
    self._setup = s = set_up(config, workdir, data=data)
    self.tokens = s.tokens
    self._step: jax.stages.Compiled | None = None
    self._state: TrainState | None = None
    with contextlib.ExitStack() as stack:
      stack.enter_context(partitioning.use(s.mesh))
      self._batch = next(s.feed(0, stack))

  def compile(self) -> jax.stages.Compiled:
    """Compiles the step again."""
    s = self._setup
    with partitioning.use(s.mesh):
      step = jit_train_step(s.model, s.optimizer, s.config, s.abstract, s.mesh)
      return step.lower(s.abstract, self._batch, s.key).compile()

  def __call__(self) -> dict[str, Any]:
    s = self._setup
    if self._step is None:
      self._step = self.compile()
      with partitioning.use(s.mesh):
        self._state = make_state(s.model, s.optimizer, seeds(s.config)["init"], s.abstract)
    self._state, pairs = self._step(self._state, self._batch, s.key)
    jax.block_until_ready(self._state)
    return jax.device_get(pairs)


def measure(config: ConfigDict, runs: int, data: Any = None) -> dict[str, Any]:
  """The figures that docs/measures.md defines under `benchmark step`; `data` as of `train`."""
  with tempfile.TemporaryDirectory() as folder:
    steps = {name: Steps(c, os.path.join(folder, name), data)
             for name, c in (("sparse", config), ("dense", dense_twin(config)))}
    times = interleave(steps, runs)
  sparse, dense = times["sparse"], times["dense"]
  return ({"tokens": steps["sparse"].tokens, "runs": runs} | sparse.named("step_ms")
          | dense.named("dense_step_ms") | sparse.over(dense).named("step_over_dense"))
