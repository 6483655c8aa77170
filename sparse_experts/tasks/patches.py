"""The patches of an image by the number of their token: where they lie, and a picture of each."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sparse_experts.config import image_tokens
from sparse_experts.tasks.task import spans

_MOST = 4  # regions along an edge
_DIMMED = 0.4  # contrast of what is around a patch


def places(config: ConfigDict) -> list[str]:
  """Where each token of an image lies: "class token", "row 0, column 3"; of 4 x 4 regions at most."""
  side = config.data.image.size // config.model.patch_size
  along = spans(side, _MOST)
  word = lambda name, span: f"{name}s {span}" if "-" in span else f"{name} {span}"
  regions = [f"{word('row', y)}, {word('column', x)}" for y in along for x in along]
  return ["class token"] * (image_tokens(config) - side * side) + regions


def picture(config: ConfigDict, image_HWC: Any, token: int) -> np.ndarray | None:
  """The patch and the eight around it, those dimmed, uint8 [3 patch, 3 patch, 3]; grey beyond the image.

  image_HWC: in -1 to 1. None for the class token and for what follows the image.
  """
  p = config.model.patch_size
  side = config.data.image.size // p
  patch = token - (image_tokens(config) - side * side)
  if not 0 <= patch < side * side:
    return None
  y, x = (p * i for i in divmod(patch, side))
  around_HWC = np.pad(np.asarray(image_HWC), ((p, p), (p, p), (0, 0)))[y:y + 3 * p, x:x + 3 * p] * _DIMMED
  around_HWC[p:2 * p, p:2 * p] /= _DIMMED
  return np.clip(np.round((around_HWC + 1) * 127.5), 0, 255).astype(np.uint8)
