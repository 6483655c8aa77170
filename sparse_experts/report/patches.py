"""Which patches of images experts take, drawn: on a page, and as a grid with a row per expert."""

import base64
import io

import numpy as np
from PIL import Image

from sparse_experts import storage
from sparse_experts.analysis.trace import Columns
from sparse_experts.report.sample import Sample

MOST = 8  # of an expert
EDGE = 48  # pixels of one on a page, about


def patches(traced: Columns, expert: int, sample: Sample, most: int = MOST) -> list[np.ndarray]:
  """Pictures of the patches that the expert takes with the largest gates, one of an image; none of text."""
  rows = np.flatnonzero((traced["expert"] == expert) & (traced["token_id"] < 0) & traced["valid"])
  rows = np.random.default_rng(0).permutation(rows)  # equal gates in no order
  found: dict[int, np.ndarray] = {}
  for row in rows[np.argsort(-traced["gate"][rows], kind="stable")]:
    example = int(traced["example"][row])
    if len(found) == most:
      break
    if example not in found:
      record = {field: a[example] for field, a in sample.batch.items()}
      picture = sample.task.patch(record, int(traced["position"][row]))
      if picture is not None:
        found[example] = picture
  return list(found.values())


def draw(layers: dict[str, Columns], num_experts: dict[str, int], sample: Sample, path: str,
         most: int = 16) -> bool:
  """A PNG with a panel per layer, a row of `patches` per expert of the first `most`; False without any.

  A picture shows the patch and, dimmed, those around it.
  """
  from matplotlib.figure import Figure  # not pyplot, which would choose a window system

  panels = {}
  for layer, traced in layers.items():
    experts = [patches(traced, e, sample) for e in range(min(num_experts[layer], most))]
    if any(experts):
      panels[layer] = experts
  if not panels:
    return False
  edge = max(len(picture) for experts in panels.values() for row in experts for picture in row)
  cell = edge + max(edge // 8, 1)  # with a gap
  rows = max(map(len, panels.values()))
  figure = Figure(figsize=(1 + 3.6 * len(panels), 0.6 + 0.42 * rows), layout="constrained")
  for panel, (layer, experts) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
    grid = np.full((cell * len(experts), cell * MOST, 3), 255, np.uint8)
    for e, row in enumerate(experts):
      for i, picture in enumerate(row):
        grid[cell * e:cell * e + edge, cell * i:cell * i + edge] = picture
    panel.imshow(grid, interpolation="nearest")
    left = num_experts[layer] - len(experts)
    panel.set_title(layer + (f", {left} more not shown" if left else ""), fontsize=9)
    panel.set_yticks([cell * e + edge / 2 for e in range(len(experts))], range(len(experts)), fontsize=8)
    panel.set_xticks([])
    panel.set_ylabel("expert")
    panel.set_xlabel("largest gates first; what is around a patch is dimmed", fontsize=8)
  with storage.create(path) as f:
    figure.savefig(f, format="png", dpi=130)
  return True


def as_data(picture_HWC: np.ndarray) -> str:
  """A picture as the address of a PNG of few colours, enlarged without smoothing if it is small."""
  image, times = Image.fromarray(picture_HWC), max(EDGE // len(picture_HWC), 1)
  size = (image.width * times, image.height * times)
  if max(size) > 1.5 * EDGE:
    size = (EDGE, EDGE)
  image = image.resize(size, Image.Resampling.NEAREST if times > 1 else Image.Resampling.BOX)
  out = io.BytesIO()
  image.quantize(32).save(out, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
