"""The sparse layers of a run in its log: balance over time, and percentiles over many layers."""

import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sparse_experts.report.config_table import experts_of
from sparse_experts.report.log import LOGGED, Log
from sparse_experts.report.numbers import rounded

MANY = 8  # more sparse layers than these are summed up as percentiles
PERCENTILES = (0, 10, 50, 90, 100)
# {figure: (title, unit, meaning)}; the first six come from the log, saturation from the cards.
FIGURES = {
    "max_vio": ("MaxVio", "", "load of the fullest expert over the mean one, minus 1; 0 when even"),
    "dead": ("dead experts", "%", "share of experts with less than a tenth of an even share, over 100 steps "
             "of training"),
    "effective_share": ("effective experts", "%",
                        "exp(entropy of the load) over the number of experts; 100% when even"),
    "dropped": ("dropped", "%", "assignments that found no slot"),
    "experts_per_token": ("experts per token", "", "assignments of a token, before drops"),
    "entropy": ("router entropy", "nats", "of the router's probabilities per token, mean"),
    "saturation": ("saturation", "%", "share of a token's final experts that it had at this step already"),
}


def columns(buckets: int, most: int) -> np.ndarray:
  """The last bucket of each column: `buckets` divided into at most `most` columns."""
  number = min(buckets, most)
  return np.floor(np.arange(1, number + 1) * buckets / max(number, 1)).astype(int) - 1


def make(log: Log, config: ConfigDict, most_columns: int) -> dict[str, Any]:
  """{"columns", "layers", "percentiles"}: see `blob.py`."""
  last = columns(len(log.step), most_columns)
  layers = [_layer(log, config, name, last) for name in sorted(log.layers.keys() | log.loads.keys())]
  percentiles = _percentiles(layers) if len(layers) > MANY else None
  return {"columns": last.tolist(), "layers": layers, "percentiles": percentiles}


def _layer(log: Log, config: ConfigDict, name: str, last: np.ndarray) -> dict[str, Any]:
  about = (log.about.get("layers") or {}).get(name) or {}
  set_experts, set_k = experts_of(config, name)
  experts, k = about.get("experts", set_experts), about.get("k", set_k)
  logged = log.layers.get(name, {})
  series: dict[str, list[float | None] | None] = {}
  for figure, key in LOGGED.items():
    if key not in logged:
      series[figure] = None
      continue
    x = _averaged(np.array(logged[key], np.float64), last)
    if figure == "max_vio":
      x = x - 1
    if figure == "dead":
      x = x / experts if experts else np.full_like(x, math.nan)
    series[figure] = rounded(x)
  return {"name": name, "experts": experts, "k": k, "series": series, "load": _load(log, name, last, experts)}


def _load(log: Log, name: str, last: np.ndarray, experts: int) -> dict[str, Any] | None:
  """The heat map: shares times their number, so 1 is an even share; a list per expert or block of experts."""
  rows = log.loads.get(name)
  if not rows:
    return None
  width = max(len(row) for row in rows if row)
  table = np.full((len(log.step), width), math.nan)
  for i, row in enumerate(rows):
    if row and len(row) == width:
      table[i] = row
  even = _averaged(table, last).T * width
  ends = np.floor(np.arange(1, width + 1) * max(experts, width) / width).astype(int)
  names = [str(a) if b - a <= 1 else f"{a}-{b - 1}" for a, b in zip([0, *ends[:-1].tolist()], ends.tolist())]
  return {"experts": names, "even": [rounded(row, 3) for row in even],
          "largest": float(np.nanmax(even)), "last": rounded(_final(table) * width, 3)}


def _averaged(x: np.ndarray, last: np.ndarray) -> np.ndarray:
  """Means of what is there over the buckets of each column; NaN where a column has none."""
  if len(x) < last[-1] + 1:
    x = np.concatenate([x, np.full((last[-1] + 1 - len(x), *x.shape[1:]), math.nan)])
  starts = np.concatenate([[0], last[:-1] + 1])
  there = np.isfinite(x)
  total, number = (np.add.reduceat(a, starts, axis=0) for a in (np.where(there, x, 0.0), there.astype(float)))
  return np.where(number > 0, total / np.maximum(number, 1), math.nan)


def _final(table: np.ndarray) -> np.ndarray:
  """The last row that is there."""
  whole = table[np.isfinite(table).all(1)]
  return whole[-1] if len(whole) else table[-1]


def _percentiles(layers: list[dict[str, Any]]) -> dict[str, Any]:
  """{figure: {"0": series, "10": ...}} over the layers that have the figure."""
  found: dict[str, Any] = {}
  for figure in LOGGED:
    series = [layer["series"][figure] for layer in layers if layer["series"][figure]]
    if series:
      width = max(map(len, series))
      x = np.full((len(series), width), math.nan)
      for row, values in zip(x, series):
        row[:len(values)] = [math.nan if v is None else v for v in values]
      there = np.isfinite(x).any(0)
      table = np.full((len(PERCENTILES), width), math.nan)
      table[:, there] = np.nanpercentile(x[:, there], PERCENTILES, axis=0)
      found[figure] = {str(p): rounded(row) for p, row in zip(PERCENTILES, table)}
  return found
