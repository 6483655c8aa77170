"""Calibration: whether a model is right as often as it is confident, with intervals over documents.

A forecast is a model's probability of the value it finds likeliest (its confidence), and whether that value
came. `Tally` adds forecasts up in a table of fixed size, so no evaluation is too long; figures and intervals
follow from the table. Letters: N forecasts, G groups of documents, C cells of confidence, S bins,
R resamples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from sparse_experts import partitioning
from sparse_experts.data import Dataset
from sparse_experts.data.feed import eval_batches
from sparse_experts.tasks import task_of
from sparse_experts.training.countdown import Countdown
from sparse_experts.training.evaluate import LEVEL, batch_rows
from sparse_experts.training.run import Run

BINS = 15  # of a calibration error, as Guo et al. 2017
GROUPS = 1000  # of documents, at most
RESAMPLES = 2000
# Cells are fine at both ends, where confidences crowd: steps of 0.05 of the log-odds. The edges of bins of
# equal width are among theirs.
_EDGES = np.union1d(1 / (1 + np.exp(-np.linspace(-12, 12, 481))), np.arange(1, BINS) / BINS)
CELLS = len(_EDGES) + 1


def calibrate(run: Run, dataset: Dataset | None = None, num_records: int | None = None,
              say: Callable[[str], None] = lambda line: None) -> "Tally":
  """Forecasts of a run, dropless, on the records that `evaluate` takes, or on the first `num_records`.

  Of text each next token, of images the class. say: takes the lines on progress.
  """
  task, dataset = task_of(run.config), run.dataset("valid") if dataset is None else dataset
  task.check_forecasts()
  total = min(task.evaluated_records(dataset) if num_records is None else num_records, len(dataset))
  model = run.abstract_model("dropless")
  look = jax.jit(lambda params, buffers, batch: task.forecasts(model.apply(params, buffers, batch)[0], batch),
                 out_shardings=partitioning.replicated(run.mesh))
  rows, sharding = batch_rows(model, run.config, run.mesh, dataset), partitioning.batch_sharding(run.mesh)
  tally, start, countdown = Tally(), 0, Countdown(total, say).start("calibration")
  for batch in eval_batches(dataset, rows, sharding, total):
    with partitioning.use(run.mesh):
      *found, scored_BL = jax.device_get(look(run.params, run.buffers, batch))
    records = range(start, min(start + rows, total))
    document_BL = np.stack([np.broadcast_to(dataset.documents(i), scored_BL.shape[1:]) for i in records])
    scored_BL = scored_BL[:len(records)]  # later rows fill up the batch
    confidence_N, right_N, brier_N, nats_N = (x_BL[:len(records)][scored_BL] for x_BL in found)
    tally.add(confidence_N, right_N, brier_N, nats_N, document_BL[scored_BL])
    start += rows
    countdown(min(start, total))
  return tally


class Tally:
  """Sums over forecasts by group of documents and by cell of confidence: 12 MB, however many are added.

  Documents are numbered; those whose numbers are equal modulo GROUPS are one group. Groups of whole documents
  are independent if documents are, and they are what is resampled.
  """

  def __init__(self) -> None:
    self._cells_3GC = np.zeros((3, GROUPS, CELLS))  # number, confidence, right
    self._scores_2G = np.zeros((2, GROUPS))  # nats, Brier scores

  def add(self, confidence_N: ArrayLike, right_N: ArrayLike, brier_N: ArrayLike, nats_N: ArrayLike,
          document_N: ArrayLike) -> None:
    """Adds forecasts: confidence 0 to 1, whether right, Brier score, nats, and number of the document."""
    confidence_N, group_N = np.asarray(confidence_N, np.float64), np.asarray(document_N, np.int64) % GROUPS
    flat_N = group_N * CELLS + np.searchsorted(_EDGES, confidence_N, side="right")
    for sums_GC, x_N in zip(self._cells_3GC, (None, confidence_N, right_N)):
      sums_GC += np.bincount(flat_N, None if x_N is None else np.asarray(x_N, np.float64),
                             GROUPS * CELLS).reshape(GROUPS, CELLS)
    for sums_G, x_N in zip(self._scores_2G, (nats_N, brier_N)):
      sums_G += np.bincount(group_N, np.asarray(x_N, np.float64), GROUPS)

  def report(self, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Figures and their 95% intervals; names as in docs/measures.md, below `calibration/`.

    {figure: number}, targets and groups; intervals {figure: (low, high)}, None of fewer than two groups; bins
    [{share, confidence, accuracy}] of equal mass. Raises ValueError before anything was added.
    """
    used_G = self._cells_3GC[0].sum(1) > 0
    if not used_G.any():
      raise ValueError("no forecast was added")
    cells_3GC, scores_2G = self._cells_3GC[:, used_G], self._scores_2G[:, used_G]
    number_G, confidence_G, right_G = cells_3GC.sum(2)
    means = {"nats": scores_2G[0], "brier": scores_2G[1], "accuracy": right_G,
             "overconfidence": confidence_G - right_G}
    binned = {name: _merge(cells_3GC, bin_C) for name, bin_C in (
        ("equal_mass", equal_mass(cells_3GC[0].sum(0))), ("equal_width", equal_width()))}
    once_1G = np.ones((1, used_G.sum()))
    found: dict[str, Any] = {name: x_G.sum() / number_G.sum() for name, x_G in means.items()}
    errors = {name: calibration_errors(sums_3GS, once_1G) for name, sums_3GS in binned.items()}
    for name, of in errors.items():
      found |= {f"{name}/ece": of.ece[0], f"{name}/ece2": _root(of.square[0]),
                f"{name}/ece2_debiased": _root(of.debiased[0])}
    found = {name: float(x) for name, x in found.items()}
    intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(
        [*means, *(f"{name}/ece2_debiased" for name in binned)])
    if used_G.sum() > 1:
      weight_RG = resampled(int(used_G.sum()), resamples, seed)
      n_R = weight_RG @ number_G
      intervals |= {name: _percentiles(weight_RG @ x_G / n_R) for name, x_G in means.items()}
      for name, sums_3GS in binned.items():
        # A resample's true error is the plain one of what it is drawn from: so far is its estimate off.
        off_R = calibration_errors(sums_3GS, weight_RG).debiased - errors[name].usable[0]
        low, high = _percentiles(off_R)
        square = float(errors[name].debiased[0])
        intervals[f"{name}/ece2_debiased"] = (_root(square - high), _root(square - low))
    number_S, confidence_S, right_S = binned["equal_mass"].sum(1)
    return found | {"targets": int(number_G.sum()), "groups": int(used_G.sum()), "intervals": intervals,
                    "bins": [{"share": float(n / number_G.sum()), "confidence": float(c / n),
                              "accuracy": float(r / n)} for n, c, r in zip(number_S, confidence_S, right_S)]}


class Errors(NamedTuple):
  """Calibration errors of each resample, over bins s with share w_s and gap g_s = accuracy - confidence."""

  ece: np.ndarray  # Σ w |g|
  square: np.ndarray  # Σ w g²
  debiased: np.ndarray  # Σ w (g² - variance of g), over bins with two groups at least
  usable: np.ndarray  # Σ w g² over the same bins


def calibration_errors(sums_3GS: np.ndarray, weight_RG: np.ndarray) -> Errors:
  """Plain and debiased calibration errors where each group counts as often as `weight_RG` says.

  sums_3GS: number of forecasts, their confidences and how many were right, by group and bin.

  Plain errors are too large by the noise of the gaps: g² by its variance. The debiased square takes an
  unbiased estimate of that off (Kumar et al. 2019, Verified Uncertainty Calibration, and
  `unbiased_square_ce` of their p-lambda/verified_calibration; before them Ferro & Fricker 2012). Theirs is
  accuracy (1 - accuracy) / (n - 1), for independent forecasts; ours is the variance of a ratio over groups of
  documents (Cochran 1977, section 6.4), as tokens of one document are alike. Of documents of one token each
  the two agree, but for what confidence varies within a bin. A bin that a single group fills says nothing of
  its noise and is left out of the debiased square.
  """
  n_GS, gap_GS = sums_3GS[0], sums_3GS[2] - sums_3GS[1]
  n_RS, groups_RS = weight_RG @ n_GS, weight_RG @ (n_GS > 0)
  with np.errstate(invalid="ignore", divide="ignore"):
    gap_RS = np.where(n_RS > 0, weight_RG @ gap_GS / n_RS, 0.0)
    residual_RS = (weight_RG @ gap_GS**2 - 2 * gap_RS * (weight_RG @ (gap_GS * n_GS))
                   + gap_RS**2 * (weight_RG @ n_GS**2))
    variance_RS = np.maximum(residual_RS, 0) / n_RS**2 * groups_RS / (groups_RS - 1)
  share_RS, two_RS = n_RS / n_RS.sum(1, keepdims=True), groups_RS > 1
  over = lambda x_RS: (share_RS * x_RS).sum(1)
  return Errors(over(np.abs(gap_RS)), over(gap_RS**2), over(np.where(two_RS, gap_RS**2 - variance_RS, 0.0)),
                over(np.where(two_RS, gap_RS**2, 0.0)))


def equal_mass(number_C: np.ndarray, bins: int = BINS) -> np.ndarray:
  """The bin of each cell, with about as many forecasts each; a cell is not divided."""
  middle_C = np.cumsum(number_C) - number_C / 2
  return np.minimum(middle_C / number_C.sum() * bins, bins - 1).astype(np.int64)


def equal_width() -> np.ndarray:
  """The bin of each cell, BINS of them from 0 to 1."""
  middle_C = (np.r_[0.0, _EDGES] + np.r_[_EDGES, 1.0]) / 2
  return (middle_C * BINS).astype(np.int64)


def resampled(groups: int, resamples: int, seed: int) -> np.ndarray:
  """How often each group is drawn, _RG: as many as there are, with replacement (Efron & Tibshirani 1993)."""
  return np.random.default_rng(seed).multinomial(
      groups, np.full(groups, 1 / groups), resamples).astype(np.float64)


def _merge(cells_3GC: np.ndarray, bin_C: np.ndarray) -> np.ndarray:
  """Sums over the cells of each bin, _3GS, which are neighbours; bins without forecasts are left out."""
  sums_3GS = np.add.reduceat(cells_3GC, np.flatnonzero(np.diff(bin_C, prepend=-1)), axis=-1)
  return sums_3GS[..., sums_3GS[0].sum(0) > 0]


def _percentiles(x_R: np.ndarray) -> tuple[float, float]:
  low, high = np.quantile(x_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return float(low), float(high)


def _root(square: float) -> float:
  """0 of a debiased square below 0, as half of a calibrated model's are."""
  return float(np.sqrt(max(square, 0.0)))
