"""The published final losses of 223 language models, as arrays.

The file is curves.csv.gz of google-deepmind/scaling_laws_for_routing.
"""

import csv
import functools
import gzip
from typing import NamedTuple

import numpy as np

from sparse_experts.analysis.scaling import utilisation

ROUTERS = ("S-Base", "RL-R", "Hash")
_LOSS = "loss_validation"


class Runs(NamedTuple):
  """Final figures of runs, an entry each.

  flops: of a training step. wider: how many times as wide as usual a dense run's FFNs are.
  """

  router: np.ndarray
  size: np.ndarray  # label of the dense base network, such as 25M
  params: np.ndarray  # all
  dense_params: np.ndarray  # the law's N
  experts: np.ndarray
  k: np.ndarray
  frequency: np.ndarray  # share of FFNs that are routed
  flops: np.ndarray
  wider: np.ndarray
  seed: np.ndarray
  loss: np.ndarray  # validation, nats per token

  def where(self, chosen: np.ndarray) -> "Runs":
    return Runs(*(column[chosen] for column in self))


@functools.cache
def read(path: str) -> Runs:
  """The last row of each run; the file is read once for all routers."""
  last: dict[str, dict[str, str]] = {}
  with gzip.open(path, "rt", encoding="utf-8", newline="") as f:
    for row in csv.DictReader(f):
      if row["hyper_id"] not in last or int(row["step"]) > int(last[row["hyper_id"]]["step"]):
        last[row["hyper_id"]] = row
  rows = list(last.values())
  numbers = lambda name: np.array([float(row[name]) for row in rows])
  texts = lambda name: np.array([row[name] for row in rows])
  return Runs(texts("router_type"), texts("model_size_label"), numbers("total_parameter_count"),
              numbers("dense_parameter_count"), numbers("num_experts"), numbers("k"),
              numbers("routing_frequency"), numbers("flops_per_step"), numbers("flop_increase"),
              numbers("seed"), numbers(_LOSS))


def fitted(runs: Runs, router: str) -> Runs:
  """What a router's law is fitted to: k = 1, half of the FFNs routed, seed 42, and the dense runs."""
  return runs.where(np.isin(runs.router, (router, "Dense")) & (runs.k == 1) & (runs.frequency == 0.5)
                    & (runs.wider == 1) & (runs.seed == 42))


def all_of(runs: Runs, router: str) -> Runs:
  """A router's runs of every k and routing frequency, and all dense ones."""
  return runs.where(np.isin(runs.router, (router, "Dense")) & (runs.seed == 42))


def kinds(runs: Runs) -> dict[str, np.ndarray]:
  """{what a run is, in words: which runs are}, by k, share of routed FFNs and width of a dense run's FFNs."""
  usual = (runs.k == 1) & (runs.frequency == 0.5)
  found = {"k = 1, 1/2 of the FFNs": usual & (runs.wider == 1)}
  found |= {f"k = {k:g}": (runs.k == k) & (runs.router != "Dense") for k in (2, 4)}
  found |= {f"{words} of the FFNs": np.isclose(runs.frequency, share) & (runs.router != "Dense")
            for words, share in (("all", 1), ("1/4", 1 / 4), ("1/8", 1 / 8), ("1/12", 1 / 12))}
  found["dense, wider FFNs"] = runs.wider > 1
  return {name: here for name, here in found.items() if here.any()}


def dense_flops(runs: Runs) -> dict[str, float]:
  """FLOPs of a step of the dense base network of each size."""
  base = runs.where((runs.router == "Dense") & (runs.wider == 1))
  return dict(zip(base.size.tolist(), base.flops.tolist(), strict=True))


def effective(runs: Runs, sizes: Runs) -> tuple[np.ndarray, np.ndarray]:
  """(relative FLOPs F, utilisation B) of the law's general form; F is the dense N that costs as much."""
  base = dense_flops(sizes)
  dense = np.array([base[size] for size in runs.size])
  used = utilisation(runs.params, runs.flops, runs.dense_params, dense)
  return runs.dense_params * runs.flops / dense, used
