"""Times the start of a run: compiling a deeper model, and from the shell to the first step."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from sparse_experts.benchmark.step import Steps
from sparse_experts.benchmark.timing import interleave
from sparse_experts.config import ConfigDict, replaced
from sparse_experts.errors import UserError

DEPTHS = (6, 24)


def compile_growth(config: ConfigDict, depths: Sequence[int] = DEPTHS, data: Any = None) -> dict[str, Any]:
  """Seconds to trace and compile the train step by number of layers, the second time each."""
  with tempfile.TemporaryDirectory() as folder, _without_cache():
    times = interleave({n: Steps(replaced(config, {"model.num_layers": n}), f"{folder}/{n}", data).compile
                        for n in depths}, 1)
  seconds = [times[n].median / 1e3 for n in depths]
  return {"compile_layers": list(depths), "compile_seconds": seconds,
          "compile_growth": seconds[-1] / seconds[0]}


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
  before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # added at run time
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # jax checks only once whether there is one
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def first_steps(flags: Sequence[str]) -> dict[str, float]:
  """Seconds from the start of `train FLAGS` to its first step, twice: without compiled programs and with."""
  with tempfile.TemporaryDirectory() as folder:
    cold, warm = (first_step([*flags, f"--workdir={folder}/{name}"], f"{folder}/compiled")
                  for name in ("cold", "warm"))
  return {"first_step_cold_seconds": cold, "first_step_warm_seconds": warm}


def first_step(flags: Sequence[str], cache: str) -> float:
  """Seconds until `train` prints its first step; the process is then ended."""
  command = [sys.executable, "-m", "sparse_experts", "train", *flags, "--config.train.log_every=1"]
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
  start, last = time.perf_counter(), ""
  with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                        text=True) as process:
    for last in process.stderr or ():
      if last.startswith("step 1/"):
        taken = time.perf_counter() - start
        process.kill()
        return taken
  raise UserError(f"train {' '.join(flags)} made no step: {last.strip()}")
