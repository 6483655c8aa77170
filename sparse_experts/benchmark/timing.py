"""Times programs in turn, so that compared ones run in the same minutes on a machine in the same state."""

import dataclasses
import functools
import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from importlib import metadata
from typing import Any, TypeVar

import jax
import numpy as np

K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Program:
  """A function with its arguments: `program()` runs it to completion; it is compiled at the first use.

  Arguments are not constants, which the compiler would fold.
  """

  function: Callable[..., Any]
  arguments: tuple

  @functools.cached_property
  def compiled(self) -> jax.stages.Compiled:
    return jax.jit(self.function).lower(*self.arguments).compile()

  def on(self, arguments: tuple) -> "Program":
    """The same program, compiled once, on other arguments of the same shapes."""
    other = dataclasses.replace(self, arguments=arguments)
    other.__dict__["compiled"] = self.compiled
    return other

  def __call__(self) -> Any:
    return jax.block_until_ready(self.compiled(*self.arguments))


@dataclasses.dataclass(frozen=True)
class Sample:
  """One number per round, in the order of the rounds."""

  values: np.ndarray

  @property
  def median(self) -> float:
    return float(np.median(self.values))

  @property
  def quartiles(self) -> list[float]:
    return [float(q) for q in np.quantile(self.values, (0.25, 0.75))]

  def named(self, name: str) -> dict[str, Any]:
    """Median and quartiles, as the results call them."""
    return {name: self.median, f"{name}_quartiles": self.quartiles}

  def over(self, other: "Sample") -> "Sample":
    """Ratios within each round: a slow machine slows both."""
    return Sample(self.values / other.values)

  def minus(self, other: "Sample") -> "Sample":
    return Sample(self.values - other.values)


def interleave(programs: Mapping[K, Callable[[], Any]], runs: int) -> dict[K, Sample]:
  """Milliseconds of each program in `runs` rounds; every second round goes backwards. One round warms up."""
  seconds: dict[K, list[float]] = {name: [] for name in programs}
  for program in programs.values():
    program()
  for i in range(runs):
    for name in list(programs)[:: -1 if i % 2 else 1]:
      start = time.perf_counter()
      programs[name]()
      seconds[name].append(time.perf_counter() - start)
  return {name: Sample(np.array(taken) * 1e3) for name, taken in seconds.items()}


def machine() -> dict[str, Any]:
  """The machine and versions of a measurement."""
  device = jax.devices()[0]
  return {"device": device.device_kind, "platform": device.platform, "devices": jax.device_count(),
          "cores": os.cpu_count(), "jax": jax.__version__, "jaxlib": metadata.version("jaxlib"),
          "python": platform.python_version()}
