"""The picture: losses against experts with the fitted laws, and what routing is worth in dense parameters."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparse_experts.analysis.scaling import Law
from sparse_experts.report import plots
from sparse_experts.report.picture import Picture

EXPERTS = [2.0**i for i in range(10)]


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
