"""Losses against experts with the fitted laws, what routing is worth, and the paper's figure 1."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.scaling_laws.measure import dense_loss
from sparse_experts.analysis.scaling import Law
from sparse_experts.report import plots
from sparse_experts.report.looks import dots, looks, marked
from sparse_experts.report.picture import Picture

EXPERTS = [2.0**i for i in range(10)]
LEVELS = (2.0, 2.2, 2.4, 2.6, 2.8)  # nats per token


def draw(found: Mapping[str, Any]) -> Picture:
  """found: results.json. A panel of losses per router, one of effective parameters of all."""
  laws = {router: Law(**of) for router, of in found["laws"].items()}
  picture, (*panels, worth) = plots.panels("ABCD", 11, 3.2, arms=next(iter(found["points"].values())))
  for axes, (router, sizes) in zip(panels, found["points"].items(), strict=True):
    curves = {size: {"runs": (np.log2(of["experts"]), of["loss"])} for size, of in sizes.items()}
    plots.curves(axes, curves, "log2 of experts", "validation loss, nats per token")
    for of in sizes.values():
      fitted = laws[router].loss(of["params"], EXPERTS)
      axes.plot(np.log2(EXPERTS), fitted, color="0.4", lw=0.8, ls=":", zorder=1)
    plots.title(axes, f"{router}: runs and law")
  plots.share_height(panels)
  plots.legend(picture)
  n = np.logspace(7, 11, 60)
  for style, (router, law) in zip(("-", "--", ":"), laws.items(), strict=True):
    worth.plot(np.log10(n), law.effective_params(n, 64) / n, color="0.25", ls=style, label=router)
  worth.set(xlabel="log10 of N", ylabel="effective parameters / N, 64 experts")
  worth.legend()
  plots.title(worth, "what 64 experts are worth")
  return picture


def figure_1(found: Mapping[str, Any]) -> Picture:
  """The paper's figure 1 from its data: losses of S-Base, level curves of its law, one power law for all."""
  laws = {router: Law(**of) for router, of in found["laws"].items()}
  law, sizes = laws["S-Base"], found["points"]["S-Base"]
  picture, (losses, levels, power) = plots.panels("ABC", 11, 3.6)
  for size, look in looks(sizes).items():
    of = sizes[size]
    losses.plot(np.log2(of["experts"]), of["loss"], **dots(look))
    losses.text(9.3, of["loss"][-1], size, color=look["color"], va="center", fontsize=7)
    losses.plot(np.log2(EXPERTS), law.loss(of["params"], EXPERTS), color=look["color"], lw=1)
  losses.set(xlabel="log2 of experts", ylabel="validation loss, nats per token")
  plots.title(losses, "S-Base: losses and the law")
  for name, look in looks([f"{level:g} nats" for level in LEVELS]).items():
    n_E = np.log10(law.params(float(name.split()[0]), EXPERTS))
    levels.plot(np.log2(EXPERTS), n_E, **marked(look, len(EXPERTS)))
    levels.text(9.3, n_E[-1], name, color=look["color"], va="center", fontsize=7)
  levels.set(xlabel="log2 of experts", ylabel="log10 of N")
  plots.title(levels, "S-Base: N and experts of equal loss")
  n = np.logspace(7, 10.5, 50)
  power.plot(np.log10(n), dense_loss(n), color="0.25", lw=1, label="dense, as printed")
  for router, look in looks(laws).items():
    for i, of in enumerate(found["points"][router].values()):
      worth = laws[router].effective_params(of["params"], of["experts"])
      power.plot(np.log10(worth), of["loss"], label=router if i == 0 else None, **dots(look))
  power.set(xlabel="log10 of effective parameters", ylabel="validation loss, nats per token")
  plots.title(power, "all routers: one power law")
  power.legend(fontsize=8, frameon=False)
  for axes in (losses, levels):
    axes.set_xlim(-0.4, 11.2)
  return picture
