"""Every run beside the published mean and two of its deviations: accuracy, and how experts specialise."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.understanding_moe.published import ACCURACY, ENTROPY


def draw(runs: Iterable[Mapping[str, Any]], path: str) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure  # not pyplot, which would choose a window system

  runs = list(runs)
  figure = Figure(figsize=(12, 4.5), layout="constrained")
  FigureCanvasAgg(figure)
  accuracy, entropy = figure.subplots(1, 2, width_ratios=(1.6, 1))
  _panel(accuracy, runs, "accuracy", ACCURACY, 100)
  _panel(entropy, runs, "entropy", ENTROPY, 1)
  accuracy.set_ylabel("test accuracy, %")
  entropy.set_ylabel("dispatch entropy, nats")
  entropy.axhline(math.log(4), color="0.7", lw=1, ls=":")
  accuracy.set_title("points: runs; bars: published mean, ± 2 published deviations", fontsize=9)
  entropy.set_title("0: an expert sees one cluster; dotted, ln 4: all alike", fontsize=9)
  accuracy.legend(fontsize=8, loc="center right")
  figure.savefig(path, dpi=120)


def _panel(panel, runs, name, published, scale) -> None:
  models = list(published[1])
  for m, model in enumerate(models):
    color = f"C{list(ACCURACY[1]).index(model)}"
    shift = 0.7 * ((m + 0.5) / len(models) - 0.5)
    for setting, of in published.items():
      mean, deviation = of[model]
      panel.plot([setting + shift - 0.07, setting + shift + 0.07], [mean, mean], color=color, lw=2, alpha=0.6)
      if deviation is not None:
        panel.fill_between([setting + shift - 0.07, setting + shift + 0.07], mean - 2 * deviation,
                           mean + 2 * deviation, color=color, alpha=0.2, lw=0)
    mine = [run for run in runs if run["model"] == model]
    panel.plot([run["setting"] + shift for run in mine], [scale * run[name] for run in mine], "o", ms=4,
               color=color, alpha=0.6, label=model)
  panel.set_xticks(list(published), [f"setting {s}" for s in published])
  panel.grid(axis="y", alpha=0.3)
