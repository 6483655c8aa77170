"""How a training image is changed: crop, shift, flip and RandAugment, all drawn from one generator."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_GREY = (128, 128, 128)  # where a turned or moved image leaves nothing
_VALUES, _CHANNEL = np.arange(256), np.arange(0, 3 * 256, 256)
_BILINEAR = Image.Resampling.BILINEAR  # Pillow averages over all pixels when it shrinks


def fit(image: Image.Image, size: int) -> Image.Image:
  """The image's shorter edge resized to `size`, and the square in its middle."""
  scale = size / min(image.size)
  if scale != 1:
    image = image.resize([max(round(edge * scale), size) for edge in image.size], _BILINEAR)
  left, top = ((edge - size) // 2 for edge in image.size)
  return image.crop((left, top, left + size, top + size))


def augment(image: Image.Image, options, rng: np.random.Generator) -> Image.Image:
  """A square image of `options.size` pixels; `options` is `config.data.image`."""
  image = crop(image, options.size, options.crop_area, rng) if options.crop_area < 1 else fit(
      image, options.size)
  if options.shift:
    image = shift(image, options.shift, rng)
  if options.flip and rng.random() < 0.5:
    image = ImageOps.mirror(image)
  if options.randaugment_layers:
    image = randaugment(image, options.randaugment_layers, options.randaugment_magnitude, rng)
  return image


def crop(image: Image.Image, size: int, least_area: float, rng: np.random.Generator) -> Image.Image:
  """A rectangle of `least_area` to 1 of the area and a ratio of 3/4 to 4/3, resized (Szegedy et al. 2015).

  Ten tries to find one that fits, then the middle.
  """
  width, height = image.size
  for _ in range(10):
    area = width * height * rng.uniform(least_area, 1)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
      return image.resize((size, size), _BILINEAR, box=(left, top, left + w, top + h))
  return fit(image, size)


def shift(image: Image.Image, most: int, rng: np.random.Generator) -> Image.Image:
  """Moved by up to `most` pixels along both axes, edges repeated."""
  padded = np.pad(np.asarray(image), ((most, most), (most, most), (0, 0)), mode="edge")
  top, left = rng.integers(2 * most + 1, size=2)
  return Image.fromarray(padded[top:top + image.height, left:left + image.width])


def randaugment(image: Image.Image, layers: int, magnitude: float, rng: np.random.Generator) -> Image.Image:
  """`layers` operations drawn from `OPERATIONS`, each at `magnitude` / 30 of its range (Cubuk et al. 2020).

  What can go either way does so with even chances.
  """
  for i in rng.integers(len(OPERATIONS), size=layers):
    sign = 1 if rng.random() < 0.5 else -1
    image = OPERATIONS[i](image, magnitude / 30, sign)
  return image


def _affine(image: Image.Image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0) -> Image.Image:
  """Pixel (x, y) of the result is (a x + b y + c, d x + e y + f) of the image."""
  return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), _BILINEAR, fillcolor=_GREY)


def _look_up(image: Image.Image, table: np.ndarray) -> Image.Image:
  """Each value replaced by that of a table [256], or of its channel's in [channel, 256].

  Pillow's own `point` spends longer on a list of them than on the image.
  """
  x = np.asarray(image)
  if table.ndim == 2:
    x = x + _CHANNEL
  return Image.fromarray(table.astype(np.uint8).ravel().take(x))


def _autocontrast(image: Image.Image) -> Image.Image:
  """Each channel stretched to 0 to 255, as `ImageOps.autocontrast` does."""
  ends = np.array(image.getextrema(), np.float64)
  low, width = ends[:, :1], ends[:, 1:] - ends[:, :1]
  scale = 255.0 / np.maximum(width, 1)
  table = np.clip((_VALUES * scale + -low * scale).astype(int), 0, 255)
  return _look_up(image, np.where(width > 0, table, _VALUES))


def _equalize(image: Image.Image) -> Image.Image:
  """Each channel's values made equally frequent, as `ImageOps.equalize` does."""
  histogram = np.array(image.histogram()).reshape(3, 256)
  below = histogram.cumsum(axis=1) - histogram
  step = below.max(axis=1, keepdims=True, where=histogram > 0, initial=0) // 255  # of all but the largest
  table = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
  return _look_up(image, np.where(step > 0, table, _VALUES))


def _enhance(kind: type) -> Callable[[Image.Image, float, int], Image.Image]:
  return lambda image, m, sign: kind(image).enhance(1 + sign * 0.9 * m)


# (image, magnitude from 0 to 1, sign) -> image. The ranges are the paper's: 30 degrees, a shear of 0.3, 0.9
# of contrast and the like, 10 pixels of 32 to move.
OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, m, sign: _autocontrast(image),
    lambda image, m, sign: _equalize(image),
    lambda image, m, sign: _look_up(image, 255 - _VALUES),
    lambda image, m, sign: _look_up(image, _VALUES & (256 - 2**round(4 * m))),  # posterize
    lambda image, m, sign: _look_up(image, np.where(round(256 * (1 - m)) > _VALUES, _VALUES, 255 - _VALUES)),
    lambda image, m, sign: image.rotate(sign * 30 * m, _BILINEAR, fillcolor=_GREY),
    lambda image, m, sign: _affine(image, b=sign * 0.3 * m),
    lambda image, m, sign: _affine(image, d=sign * 0.3 * m),
    lambda image, m, sign: _affine(image, c=sign * 0.3 * m * image.width),
    lambda image, m, sign: _affine(image, f=sign * 0.3 * m * image.height),
    _enhance(ImageEnhance.Color), _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness), _enhance(ImageEnhance.Sharpness),
)
