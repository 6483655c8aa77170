"""Image files: folders and zips whose sub-folders are classes, and one RGB array of whatever a file holds."""

import functools
import io
import types
import warnings

import numpy as np
from PIL import Image, ImageOps

from sparse_experts.data.files import members
from sparse_experts.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow knows more, of which some hand a file to another program (EPS: Ghostscript), whatever its name is.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
MOST_RATIO = 1000  # of an image's edges: resizing the shorter one makes the other as much longer
_VALID = ("valid", "validation", "val", "test")
_PARTS = ("train", *_VALID)


class Unreadable(ValueError):
  """Why a file is no image that can be used."""


def read(path: str) -> tuple[list[dict] | types.SimpleNamespace, list[str]]:
  """(images, class names) of a folder or .zip: class = sub-folder, in order of names.

  Where `train` lies next to `valid`, `validation`, `val` or `test`, these are the two parts, and the classes
  are their sub-folders. A .zip in a folder counts as its files. Hidden files are left out, and files whose
  names do not end as those of images do (`SUFFIXES`).
  """
  what, way_out = f"data.source='files:{path}'", "give a folder or .zip with a sub-folder for each class"
  named = [((*outer[:-1], *inner) if inner else outer, data)
           for outer, inner, data, _ in members(path, "an image folder or .zip")]
  named = sorted((parts, data) for parts, data in named if parts[-1].lower().endswith(SUFFIXES))
  if not named:
    raise UserError(f"{what} holds no images ({', '.join(SUFFIXES[:3])}, ...); {way_out}")
  tops = {parts[0] for parts, _ in named}
  in_parts = tops <= set(_PARTS) and "train" in tops and len(tops) > 1
  depth = 2 if in_parts else 1
  for parts, _ in named:
    if len(parts) <= depth:
      raise UserError(f"{what}: image '{'/'.join(parts)}' is in no class; {way_out}")
  classes = sorted({parts[depth - 1] for parts, _ in named})
  number = {name: i for i, name in enumerate(classes)}
  images = [(parts, dict(image=data, label=number[parts[depth - 1]], name="/".join(parts)))
            for parts, data in named]
  if not in_parts:
    return [image for _, image in images], classes
  held_out = next(name for name in _VALID if name in tops)
  train, valid = ([i for parts, i in images if parts[0] == part] for part in ("train", held_out))
  return types.SimpleNamespace(train=train, valid=valid), classes


def decode(image: np.ndarray | bytes) -> Image.Image:
  """An image file's bytes, or an array [H, W], [H, W, 1] or [H, W, 3] of uint8, in RGB.

  An image file's orientation (EXIF) is applied. Greys become three equal colours, palettes their colours, 16
  bits 8, greys of 32 bits what their range says (`_grey`), and what is transparent white.
  """
  if isinstance(image, np.ndarray):
    grey = image.ndim == 2 or image.shape[2:] == (1,)
    if image.dtype != np.uint8 or not image.size or not (grey or image.shape[2:] == (3,)):
      raise Unreadable(f"an array of {image.dtype} {image.shape}, not of uint8 [H, W], [H, W, 1], [H, W, 3]")
    _check_ratio(image.shape[1], image.shape[0])
    return Image.fromarray(image.reshape(image.shape[:2]) if grey else image).convert("RGB")
  if not isinstance(image, bytes):
    raise Unreadable(f"of type {type(image).__name__}, not an array or bytes")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      opened = Image.open(io.BytesIO(image), formats=_formats())
      _check_ratio(*opened.size)
      opened.load()
      return _rgb(ImageOps.exif_transpose(opened))
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise Unreadable(f"of more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
  except Image.UnidentifiedImageError:
    raise Unreadable("empty" if not image else "no image that Pillow knows") from None
  except Unreadable:
    raise
  except Exception as e:  # Pillow's readers raise exceptions of many types on damaged files
    raise Unreadable((str(e).strip().splitlines() or [type(e).__name__])[0][:80]) from None


@functools.cache
def _formats() -> tuple[str, ...]:
  """Those of `FORMATS` that this Pillow was built with."""
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_ratio(width: int, height: int) -> None:
  if max(width, height) > MOST_RATIO * min(width, height):
    raise Unreadable(f"{width} x {height} pixels, one edge over {MOST_RATIO:,} times the other")


def content(image: np.ndarray | bytes) -> bytes:
  """The image file, or the array with its size in front."""
  return (image if isinstance(image, bytes)
          else b"%d %d " % image.shape[:2] + np.ascontiguousarray(image).tobytes())


def _rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I") or image.mode == "F":  # which `convert` would clip
    return Image.fromarray(_grey(np.asarray(image, np.float64), image.mode)).convert("RGB")
  if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
  return image.convert("RGB")


def _grey(x_HW: np.ndarray, mode: str) -> np.ndarray:
  """uint8 of greys of 16 bits (`I;16`), or of 32: whole (`I`) or floating-point (`F`).

  White is 65535 of 16 bits. 32 bits do not say what white is: it is the least of 1 (floating-point only), 255
  and 65535 that no value exceeds; values below 0 or above all that are stretched from the lowest, black, to
  the highest, white.
  """
  if not np.isfinite(x_HW).all():
    raise Unreadable("greys that are not finite")
  low, high = x_HW.min(), x_HW.max()
  whites = (65535,) if mode.startswith("I;16") else (1, 255, 65535) if mode == "F" else (255, 65535)
  white = next((white for white in whites if low >= 0 and high <= white), None)
  if white is None:
    x_HW, white = x_HW - low, (high - low) or 1
  return np.round(x_HW / white * 255).astype(np.uint8)
