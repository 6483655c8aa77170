"""Published numbers of the scaling law beside ours: coefficients, cut-offs, effective sizes."""

import functools
from collections.abc import Callable

import numpy as np

from experiments.scaling_laws import data
from sparse_experts.analysis import scaling
from sparse_experts.analysis.scaling import Law
from sparse_experts.ledger.verdict import Figure

DRAWS, QUICK_DRAWS = 1000, 20
PUBLISHED = {
  "S-Base": Law(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
  "RL-R": Law(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
  "Hash": Law(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}
DENSE_N_C, DENSE_ALPHA = 3.568e13, 0.078  # printed for dense networks: L = (N_c / N)^alpha
CUTOFFS = {"S-Base": 937e9, "RL-R": 85e9, "Hash": 83e9}  # printed; the rounded coefficients give others


def dense_loss(params: np.ndarray) -> np.ndarray:
  """The printed power law of dense networks, nats per token."""
  return (DENSE_N_C / params) ** DENSE_ALPHA


def coefficients(path: str, quick: bool) -> list[Figure]:
  """The six numbers of each router's law."""
  return [_figure(path, quick, router, f"{router} {name}", functools.partial(_get, name), _get(name, law))
          for router, law in PUBLISHED.items() for name in scaling.NAMES]


def cutoffs(path: str, quick: bool) -> list[Figure]:
  """The size above which more experts do not help."""
  return [_figure(path, quick, router, f"{router} cut-off", lambda law: law.cutoff, published)
          for router, published in CUTOFFS.items()]


def worked_example(path: str, quick: bool) -> list[Figure]:
  """A base network of 5M parameters with 128 experts is worth 55M dense ones (S-BASE)."""
  worth = lambda law: float(law.effective_params(5e6, 128))
  return [_figure(path, quick, "S-Base", "S-Base 5M x 128", worth, 55e6)]


def _get(name: str, law: Law) -> float:
  return getattr(law, name)


def _figure(path: str, quick: bool, router: str, name: str, of: Callable[[Law], float],
            published: float) -> Figure:
  law, laws = fits(path, router, QUICK_DRAWS if quick else DRAWS)
  low, high = scaling.interval(laws, of)
  return Figure(name, published, of(law), low, high)


@functools.cache
def fits(path: str, router: str, draws: int) -> tuple[Law, list[Law]]:
  """A router's law, and those of its bootstrap."""
  runs = data.fitted(data.read(path), router)
  columns = runs.dense_params, runs.experts, runs.loss
  return scaling.fit(*columns), scaling.bootstrap(*columns, draws)
