"""Clark et al.'s scaling law, fitted to the losses that its authors published.

    python -m experiments.scaling_laws --data=DIR

DIR holds curves.csv.gz of google-deepmind/scaling_laws_for_routing. Writes results.json, picture.png and
figure_1.png.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import command
from experiments.scaling_laws import data, measure, picture
from sparse_experts import storage
from sparse_experts.analysis import scaling
from sparse_experts.analysis.table import aligned
from sparse_experts.errors import UserError
from sparse_experts.report import plots

FILE = "curves.csv.gz"


def main(argv: Sequence[str]) -> int:
  parser = command.parser("scaling_laws", __doc__)
  parser.add_argument("--data", metavar="DIR", help=f"folder of {FILE}")
  parser.add_argument("--quick", action="store_true", help="few draws: intervals mean nothing")
  parser.add_argument("--out", metavar="DIR", default="runs/scaling_laws", help="default: runs/scaling_laws")
  return command.main(parser, go, argv)


def go(args) -> None:
  if not args.data or not os.path.isfile(path := os.path.join(args.data, FILE)):
    raise UserError(f"--data={args.data or ''} holds no {FILE}; it needs data/{FILE} of the repository "
                    "google-deepmind/scaling_laws_for_routing, commit 42da0c3")
  found = results(path, args.quick)
  os.makedirs(args.out, exist_ok=True)
  storage.write_json(os.path.join(args.out, "results.json"), found)
  plots.save(picture.draw(found), os.path.join(args.out, "picture.png"))
  plots.save(picture.figure_1(found), os.path.join(args.out, "figure_1.png"))
  print(tables(found))
  print(f"results.json, picture.png and figure_1.png are in {args.out}")


def results(path: str, quick: bool) -> dict[str, Any]:
  """The figures beside the published ones, the general form, and what the picture shows."""
  runs = data.read(path)
  figures = [vars(figure) for of in (measure.coefficients, measure.cutoffs, measure.worked_example)
             for figure in of(path, quick)]
  return {"figures": figures, "general": general(runs), "points": {
      router: points(data.fitted(runs, router)) for router in data.ROUTERS}, "laws": {
      router: vars(measure.fits(path, router, measure.QUICK_DRAWS if quick else measure.DRAWS)[0])
      for router in data.ROUTERS}, "runs": len(runs.loss), "dense_law": {
          router: from_dense_law(data.fitted(runs, router)) for router in data.ROUTERS}}


def from_dense_law(runs: data.Runs) -> float:
  """How far losses are from the printed power law of dense networks at their effective parameters.

  The root mean square of log10 L; the effective parameters are by the law fitted to these runs.
  """
  worth = scaling.fit(runs.dense_params, runs.experts, runs.loss).effective_params(
      runs.dense_params, runs.experts)
  return float(np.sqrt(np.mean((np.log10(runs.loss) - np.log10(measure.dense_loss(worth))) ** 2)))


def general(runs: data.Runs) -> dict[str, dict[str, Any]]:
  """The general form per router, fitted to every k and routing frequency, beside the plain law's error.

  predicted: its errors of runs that it was not fitted to, by kind, after a fit to k = 1 and half of the FFNs
  alone: their number, root mean square and mean of log10 L, observed minus predicted.
  """
  found: dict[str, dict[str, Any]] = {}
  for router in ("S-Base", "Hash"):  # RL-R was trained with one k and frequency
    of = data.all_of(runs, router)
    flops, used = data.effective(of, runs)
    law = scaling.fit(flops, used, of.loss)
    plain = scaling.fit(of.dense_params, of.experts, of.loss)
    error = lambda predicted, of=of: float(np.sqrt(np.mean((np.log10(predicted) - np.log10(of.loss)) ** 2)))
    usual = data.fitted(runs, router)
    base = scaling.fit(*data.effective(usual, runs), usual.loss)
    log10_N, predicted = np.log10(of.loss) - np.log10(base.loss(flops, used)), {}
    for kind, here in data.kinds(of).items():
      predicted[kind] = {"runs": int(here.sum()), "error": float(np.sqrt(np.mean(log10_N[here] ** 2))),
                         "mean": float(log10_N[here].mean())}
    found[router] = {"law": vars(law), "runs": len(of.loss), "error": error(law.loss(flops, used)),
                     "error of the law in N and E": error(plain.loss(of.dense_params, of.experts)),
                     "predicted": predicted}
  return found


def points(runs: data.Runs) -> dict[str, dict[str, list[float]]]:
  """{size: experts and losses}, in order of experts."""
  order = np.argsort(runs.experts, kind="stable")
  sizes = sorted(set(runs.size.tolist()), key=lambda size: runs.dense_params[runs.size == size][0])
  return {size: {"params": float(runs.dense_params[runs.size == size][0]),
                 "experts": runs.experts[order][runs.size[order] == size].tolist(),
                 "loss": runs.loss[order][runs.size[order] == size].round(5).tolist()} for size in sizes}


def tables(found: dict[str, Any]) -> str:
  rows = [("number", "published", "ours", "95% interval", "inside")]
  rows += [(f["name"], f"{f['published']:.4g}", f"{f['ours']:.4g}", f"{f['low']:.4g} to {f['high']:.4g}",
            "yes" if f["low"] <= f["published"] <= f["high"] else "no") for f in found["figures"]]
  form = [("general form", "runs", "error of log10 loss", "of the law in N and E", "c")]
  form += [(router, str(of["runs"]), f"{of['error']:.4f}", f"{of['error of the law in N and E']:.4f}",
            f"{of['law']['c']:.4f}") for router, of in found["general"].items()]
  kinds = [("predicted from k = 1, half of the FFNs", "runs", "error of log10 loss", "mean error")]
  kinds += [(f"{router}: {kind}", str(each["runs"]), f"{each['error']:.4f}", f"{each['mean']:+.4f}")
            for router, of in found["general"].items() for kind, each in of["predicted"].items()]
  return "\n\n".join(map(aligned, (rows, form, kinds)))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
