"""Draws the pictures of all experiments again from the results that are stored; trains nothing.

Example: python -m experiments.redraw
"""

import json
import os
import sys
from collections.abc import Callable, Sequence

from experiments import command, sweep_table
from sparse_experts.report import plots
from sparse_experts.report.picture import Picture

HERE = os.path.dirname(os.path.abspath(__file__))


def main(argv: Sequence[str]) -> int:
  parser = command.parser("redraw", __doc__)
  parser.add_argument("--out", metavar="DIR", default=HERE, help="folder of their folders; default: this one")
  return command.main(parser, run, argv)


def run(args) -> None:
  for path, draw in PICTURES.items():
    out = os.path.join(args.out, path)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    plots.save(draw(), out)
    print(f"{out}: {os.path.getsize(out) / 1000:.0f} kB", flush=True)


def limoe() -> Picture:
  from experiments.limoe import report

  return report.draw(_json("limoe/results.json"))


def stream() -> Picture:
  from experiments.routers_side_by_side import report

  return report.draw(report.reported(_json("routers_side_by_side/results.json")))


def scaling_laws() -> Picture:
  from experiments.scaling_laws import picture

  return picture.draw(_json("scaling_laws/results.json"))


def scaling_laws_figure_1() -> Picture:
  from experiments.scaling_laws import picture

  return picture.figure_1(_json("scaling_laws/results.json"))


def understanding_moe() -> Picture:
  from experiments.understanding_moe import picture

  return picture.draw(_json("understanding_moe/results.json")["runs"])


def capacity() -> Picture:
  from experiments.v_moe import pictures

  return pictures.capacity(_json("v_moe/results.json"))


def cifar() -> Picture:
  from experiments.v_moe import pictures

  found = _json("v_moe/cifar.json")
  return pictures.cifar(found["paired"], found["runs"])


def digits() -> Picture:
  from experiments.v_moe import pictures

  return pictures.digits(_json("v_moe/digits.json"))


def sweep(folder: str, title: str) -> Callable[[], Picture]:
  """Of the table in a README, all that was kept of these sweeps."""

  def draw() -> Picture:
    with open(os.path.join(HERE, folder, "README.md"), encoding="utf-8") as f:
      return sweep_table.draw(sweep_table.read(f.read(), title))

  return draw


def _json(path: str):
  with open(os.path.join(HERE, path), encoding="utf-8") as f:
    return json.load(f)


PICTURES: dict[str, Callable[[], Picture]] = {
    "limoe/picture.png": limoe,
    "routers_side_by_side/stream.png": stream,
    "routers_side_by_side/spans.png": sweep("routers_side_by_side", "**Result, spans**"),
    "routers_side_by_side/causal.png": sweep("routers_side_by_side", "**Result, causal**"),
    "scaling_laws/picture.png": scaling_laws,
    "scaling_laws/figure_1.png": scaling_laws_figure_1,
    "sparse_vs_dense/picture.png": sweep("sparse_vs_dense", "**Result**"),
    "understanding_moe/picture.png": understanding_moe,
    "v_moe/capacity.png": capacity,
    "v_moe/cifar.png": cifar,
    "v_moe/digits.png": digits,
}

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
