"""TPU chips and slices: published figures per chip, and the settings for compiling without a TPU.

Peak rates, capacities and bandwidths are Google Cloud's, from its page on each version ("System
architecture" of TPU v4, v5e, v5p, v6e and TPU7x). ICI is one direction, half of the bidirectional figure
there: what a chip can send over all its links together. `usable_gib` is not published: it is the
limit in the error of libtpu's compiler (0.0.42 and 0.0.52) for a program that is too large, for all devices
of a chip.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from sparse_experts.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
  """Per chip: HBM in GiB, rates in FLOP/s (bfloat16) and bytes/s. `devices`: those that jax sees."""

  devices: int
  hbm_gib: float
  usable_gib: float
  flops: float
  hbm: float
  ici: float
  dcn: float
  dimensions: int  # of the torus
  ring: int  # the shortest edge of a slice that is closed to a ring


CHIPS = {
    # ICI from the paper (Jouppi et al. 2023: six links of 50 GB/s). DCN is not on the page: v5p's, a guess.
    "v4": Chip(1, 32, 30.75, 275e12, 1.2e12, 300e9, 6.25e9, 3, 4),
    # The page gives 6.4 Tb/s of data center network for the 256 chips of a pod.
    "v5e": Chip(1, 16, 15.75, 197e12, 0.819e12, 200e9, 3.125e9, 2, 16),
    "v5p": Chip(1, 95, 95.73, 459e12, 2.765e12, 600e9, 6.25e9, 3, 4),
    "v6e": Chip(1, 32, 31.24, 918e12, 1.638e12, 400e9, 12.5e9, 2, 16),
    "tpu7x": Chip(2, 192, 189.48, 2307e12, 7.38e12, 600e9, 12.5e9, 3, 4),
}
# What jax and libtpu need without a TPU, set before they are first used. The last lets several processes
# compile at once.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
INSTALL = "pip install '.[aot]'"
# Edges of the slices that `--find` goes through, smallest first.
_SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
        "16x16x16")}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips joined by links, or `count` such slices; the devices in jax's order."""

  name: str
  chip: Chip
  edges: tuple[int, ...]
  devices: list[Any]
  count: int = 1

  @property
  def chips(self) -> int:
    return math.prod(self.edges) * self.count

  def hops(self, devices: list[Any]) -> float:
    """Mean number of links between two of the devices, which are of one slice; at least 1."""
    places = {tuple(d.coords) for d in devices}
    if len(places) < 2:
      return 1.0
    steps = sum(self._mean_distance([p[i] for p in places], edge) for i, edge in enumerate(self.edges))
    return max(1.0, steps * len(places) / (len(places) - 1))

  def _mean_distance(self, along: list[int], edge: int) -> float:
    """Mean distance along one edge over all ordered pairs, each with itself included."""
    closed = edge % self.chip.ring == 0
    total = sum(min(abs(a - b), edge - abs(a - b)) if closed else abs(a - b) for a in along for b in along)
    return total / len(along) ** 2


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
  """"v5p:4x4x4" -> ("v5p", (4, 4, 4)); without edges (), the chip alone."""
  name, _, edges = topology.partition(":")
  if name not in CHIPS:
    raise UserError(f"--topology={topology}: chip '{name}' is unknown{nearest(name, CHIPS)}")
  if not edges:
    return name, ()
  chip = CHIPS[name]
  example = "x".join(["4"] * chip.dimensions)
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", edges) or edges.count("x") != chip.dimensions - 1:
    raise UserError(f"--topology={topology}: a slice of {name} has {chip.dimensions} edges; write for "
                    f"example {name}:{example}")
  return name, tuple(int(n) for n in edges.split("x"))


def slices(name: str) -> list[str]:
  """Topologies of a chip, smallest first."""
  return [f"{name}:{edges}" for edges in _SLICES[CHIPS[name].dimensions]]


def need_libtpu(topology: str) -> None:
  """Raises UserError if libtpu, the compiler for TPUs, is missing."""
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(f"--topology={topology}: compiling for a TPU without one needs libtpu; {INSTALL}")


def get_slice(topology: str, count: int = 1) -> Slice:
  """A slice, or `count` of them, for which programs can be compiled here.

  Raises UserError if libtpu is missing or knows no such slice.
  """
  name, edges = parse(topology)
  need_libtpu(topology)
  from jax.experimental import topologies

  os.environ.update(ENVIRONMENT)

  try:
    # Both cores of a v4 are one device, as on a real one; of v5p they always are.
    extra: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}
    extra |= {"num_slices": count} if count > 1 else {}
    if math.prod(edges) == 1:  # by default a host has four
      extra["chips_per_host_bounds"] = (1, 1, 1)
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra)
  except Exception as e:
    raise UserError(f"--topology={topology}: libtpu refuses it ({str(e).splitlines()[0]}); write for example "
                    f"{', '.join(slices(name)[1:5])}") from None
  return Slice(topology, CHIPS[name], edges, list(description.devices), count)
