"""The figures of all runs as a Markdown table with paired differences, and as a picture."""

from collections.abc import Mapping, Sequence

import numpy as np

from sparse_experts.analysis.compare import spread
from sparse_experts.analysis.table import aligned

Found = Mapping[str, Sequence[Mapping[str, float]]]  # arm -> figures by seed
FIGURES = {"experts": "experts used", "largest": "share of the largest", "local": "local entropy, nats",
           "success": "success rate"}
WHOLE = {"image_to_text": "image finds text", "text_to_image": "text finds image",
         "nats_per_pair": "nats per pair"}


def layers(figures: Mapping[str, float]) -> list[str]:
  last = "/text/experts"
  return sorted(name.removesuffix(last) for name in figures if name.endswith(last))


def in_words(figures: Mapping[str, float]) -> str:
  used = ", ".join(f"{figures[f'{layer}/text/experts']:.2f} in {layer}" for layer in layers(figures))
  return (f"text uses {used}; {figures['image_to_text']:.1%} of images find their text and "
          f"{figures['text_to_image']:.1%} of texts their image")


def table(found: Found) -> str:
  """Means ± standard deviations over seeds; the first arm minus each other, paired, with its 95% interval."""
  first, *others = found
  rows = [["figure", "tokens", "layer", *found, *(f"{first} minus {other}" for other in others)]]
  keys = [(f"{layer}/{modality}/{name}", (words, modality, layer)) for name, words in FIGURES.items()
          for modality in ("text", "image") for layer in layers(found[first][0])]
  for key, labels in keys + [(name, (words, "", "")) for name, words in WHOLE.items()]:
    values = {arm: np.array([figures[key] for figures in runs]) for arm, runs in found.items()}
    each = (spread(v) for v in values.values())
    between = (spread(values[first] - values[other]) for other in others)
    rows.append([*labels, *(f"{s.mean:.3f} ± {s.deviation:.3f}" for s in each),
                 *("{:+.3f} ({:+.3f} to {:+.3f})".format(s.mean, *s.interval) for s in between)])
  return aligned(rows)


def draw(found: Found, path: str) -> None:
  """A point per run: experts used, by layer, of image and of text tokens."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure  # not pyplot, which would choose a window system

  figure = Figure(figsize=(9, 3.5), layout="constrained")
  FigureCanvasAgg(figure)
  names = layers(next(iter(found.values()))[0])
  for panel, modality in zip(figure.subplots(1, 2, sharey=True), ("text", "image")):
    for a, (arm, runs) in enumerate(found.items()):
      at = np.arange(len(names)) + 0.15 * (a - (len(found) - 1) / 2)
      for i, figures in enumerate(runs):
        used = [figures[f"{layer}/{modality}/experts"] for layer in names]
        panel.plot(at, used, "o", color=f"C{a}", alpha=0.7, label=None if i else arm)
    panel.set_xticks(range(len(names)), names)
    panel.set(title=f"{modality} tokens", xlim=(-0.5, len(names) - 0.5))
    panel.grid(axis="y", alpha=0.3)
    panel.legend(loc="lower right")
  panel.set_ylim(0)  # of both, once both are drawn
  figure.supylabel("experts used: exp H(shares)", fontsize=10)
  figure.savefig(path, dpi=120)
