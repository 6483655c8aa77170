"""Draws `one_layer.svg` and `one_layer_dark.svg`: what a sparse layer of a trained run does with its tokens.

    python docs/images/one_layer.py --workdir=runs/smoke

The arrays are the run's: probabilities, choices and drops of one routing group of the validation records,
with the capacity of training and without noise. Its last tokens are shown, as there experts are full.
"""

import argparse
import pathlib

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

import sparse_experts
from sparse_experts.analysis import probe, trace

SHOWN = 44  # tokens
THEMES = {  # colours of GitHub's two themes; `on` is that of text on a kept token
  "one_layer": dict(ink="#1f2328", quiet="#59636e", cell="#59636e", kept="#0969da", lost="#bc4c00",
                    on="#ffffff"),
  "one_layer_dark": dict(ink="#f0f6fc", quiet="#9198a1", cell="#9198a1", kept="#4493f8", lost="#f0883e",
                         on="#0d1117"),
}


def read(workdir: str, layer: str, group: int) -> tuple:
  """(text, prob_TE, expert_T, kept_T, slots) of a routing group in a top-1 layer of byte tokens."""
  run = sparse_experts.load(workdir)
  sparse = run.abstract_model("train").sparse_layers[layer]
  rows = sparse.group_size // run.config.data.length
  traced = trace.trace(run, probe.probe(run, (group + 1) * rows), kind="train")
  here = (traced["layer"] == layer) & (traced["example"] >= group * rows)
  t = {name: column[here] for name, column in traced.items()}
  prob_TE = np.zeros((len(t["expert"]), sparse.num_experts))
  for i in range(sparse.num_experts):
    np.put_along_axis(prob_TE, t[f"prob_expert_{i}"][:, None], t[f"prob_{i}"][:, None], axis=1)
  text = run.tokenizer.decode(t["token_id"]).replace(" ", "\u2423").replace("\n", "\u21b5")
  return text, prob_TE, t["expert"], t["kept"], sparse.capacity


def draw(text, prob_TE, expert_T, kept_T, slots, *, ink, quiet, cell, kept, lost, on) -> Figure:
  """Left a score of tokens by experts, right how full each expert is."""
  E, first = prob_TE.shape[1], len(expert_T) - SHOWN
  figure = Figure(figsize=(11, 2.9))
  score = figure.add_axes((0.065, 0.12, 0.755, 0.85))
  bars = figure.add_axes((0.84, 0.12, 0.155, 0.85), sharey=score)
  box = lambda x, y, **kwargs: score.add_patch(FancyBboxPatch(
      (x - 0.36, y - 0.36), 0.72, 0.72, boxstyle="round,pad=0.06", **kwargs))
  letter = lambda x, y, sign, color, **kwargs: score.text(
      x, y + 0.03, sign, color=color, family="DejaVu Sans Mono", ha="center", va="center", **kwargs)

  for x, t in enumerate(range(first, len(expert_T))):
    for e in range(E):
      score.add_patch(Rectangle((x - 0.42, e - 0.42), 0.84, 0.84, color=cell, lw=0,
                                alpha=float(0.6 * prob_TE[t, e] / prob_TE[first:].max())))
    e, color = expert_T[t], kept if kept_T[t] else lost
    box(x, e, facecolor=color if kept_T[t] else "none", edgecolor=color, lw=1.3)
    letter(x, e, text[t], on if kept_T[t] else lost, size=9.5, weight="bold")
    letter(x, -1.25, text[t], color, size=11, weight="normal" if kept_T[t] else "bold")

  load_E, served_E = np.bincount(expert_T, minlength=E), np.bincount(expert_T[kept_T], minlength=E)
  bars.barh(range(E), served_E, height=0.66, color=kept)
  over_E = np.flatnonzero(load_E > served_E)
  bars.barh(over_E, (load_E - served_E)[over_E], left=served_E[over_E], height=0.66, color="none",
            edgecolor=lost, lw=1.3)
  bars.plot([slots, slots], [-0.6, E - 0.4], color=ink, lw=1.2)
  bars.text(slots, -1.25, f"{slots} slots", color=ink, ha="center", va="center", size=10)
  for e in range(E):
    bars.text(load_E.max() * 1.2, e, load_E[e], color=quiet, ha="right", va="center", size=9)

  y = E + 0.35
  for x, label, style in ((0, "chosen, computed", dict(facecolor=kept, edgecolor=kept)),
                          (9, "chosen, dropped: the expert is full", dict(facecolor="none", edgecolor=lost))):
    box(x, y, lw=1.3, clip_on=False, **style)
    score.text(x + 0.9, y, label, color=ink, va="center", size=10)
  for i, alpha in enumerate((0.12, 0.3, 0.6)):
    score.add_patch(Rectangle((24.6 + 0.84 * i, y - 0.42), 0.84, 0.84, color=cell, lw=0, alpha=alpha,
                              clip_on=False))
  score.text(27.6, y, "the router's probability", color=ink, va="center", size=10)
  bars.text(0, y, f"load, of {len(expert_T)} tokens", color=ink, va="center", size=10)

  score.set(xlim=(-0.6, SHOWN - 0.4), ylim=(E - 0.4, -1.7), yticks=range(E),
            yticklabels=[f"expert {e}" for e in range(E)], xticks=[])
  bars.set(xlim=(0, load_E.max() * 1.2), xticks=[])
  bars.tick_params(labelleft=False)
  for axes in (score, bars):
    axes.set_facecolor("none")
    axes.tick_params(length=0, labelcolor=quiet, labelsize=10)
    axes.spines[:].set_visible(False)
  return figure


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--layer", default="decoder/01")
  parser.add_argument("--group", type=int, default=9, help="of the validation records")
  args = parser.parse_args()
  rcParams["svg.hashsalt"] = "one_layer"  # the same bytes every time
  arrays = read(args.workdir, args.layer, args.group)
  for name, colors in THEMES.items():
    path = pathlib.Path(__file__).with_name(f"{name}.svg")
    draw(*arrays, **colors).savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
  main()
