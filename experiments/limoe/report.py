"""The figures of all runs as a Markdown table with paired differences, and as a picture."""

from collections.abc import Mapping, Sequence

import numpy as np

from sparse_experts.analysis.compare import spread
from sparse_experts.analysis.table import aligned
from sparse_experts.report import plots
from sparse_experts.report.picture import Picture

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


def draw(found: Found) -> Picture:
  """Experts used by text and by image tokens, by layer: a point per run; below, the first arm minus each
  other one of the same seed."""
  (first, runs), *others = found.items()
  names = layers(runs[0])
  picture, (text, image, *minus) = plots.panels(
      "AB;" + "".join(chr(ord("C") + i) for i in range(len(others))), 9, 6, arms=found,
      height_ratios=[1.2, 1])
  used = lambda figures, layer, modality: figures[f"{layer}/{modality}/experts"]
  for axes, modality in ((text, "text"), (image, "image")):
    plots.grouped(axes, {arm: {layer: [used(figures, layer, modality) for figures in of] for layer in names}
                         for arm, of in found.items()}, f"experts used by {modality} tokens, of 8")
    axes.set_ylim(0, 8.4)
  for axes, (other, of) in zip(minus, others):
    pairs = list(zip(runs, of, strict=True))
    rows = {f"{modality}, {layer}": [used(a, layer, modality) - used(b, layer, modality) for a, b in pairs]
            for modality in ("text", "image") for layer in names}
    plots.seeds(axes, rows, f"{first} minus {other}, experts used", line=0, plain=True)
    plots.title(axes, "a point per seed; mean and its 95% t-interval")
  plots.legend(picture, lines=False)
  return picture
