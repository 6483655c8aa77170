"""Sources of images with one class each: embedded digits, folders and zips, TFDS, anyone's function.

An image is `{"image": uint8 [H, W, 3] or an image file's bytes, "label": int, "name": str}`; a `Source` names
the classes in `domains`. Files are read into memory and decoded once at the start, which finds those that
cannot be read; what a dataset keeps of it decoded is in `datasets.py`.
"""

import functools
import logging
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_experts.data import prepared
from sparse_experts.data.images import files as image_files
from sparse_experts.data.sources import (
  Source,
  called,
  fingerprint,
  items_of,
  open_named,
  split_by_class,
  two_parts,
)
from sparse_experts.errors import UserError


def open_source(config_data) -> Source:
  """The source `config_data.source` names; if it has no validation part, `valid_share` is held out."""
  images, classes = open_named(config_data, {
      "embedded": digits, "files:PATH": image_files.read,
      "tfds:NAME": functools.partial(prepared.read_images, directory=config_data.dir)})
  return as_source(images, config_data, classes)


def as_source(images: Any, config_data, classes: Sequence[str] = (), name: str | None = None) -> Source:
  """Anything with images as a Source: a sequence of dicts, or an object with `.train` and `.valid`.

  An object may also have `.domains`, names of its classes in order. `name` is what messages call it.
  """
  name = called(config_data, name)
  clean = functools.partial(_clean, skip_unreadable=config_data.image.skip_unreadable)
  train, valid = two_parts(
      images, config_data, name, clean, split, items="images", wanted="at least two of each class")
  labels = {i["label"] for i in train}
  classes = getattr(images, "domains", classes) or [str(c) for c in range(1 + max(labels))]
  for part, of in ((train, "training"), (valid, "validation")):
    if outside := [i for i in part if i["label"] >= len(classes)]:
      raise UserError(f"{name}: image '{outside[0]['name']}' has label {outside[0]['label']}, but there are "
                      f"{len(classes)} classes; name them all, or mend the label")
    if unseen := sorted({i["label"] for i in part} - labels):
      raise UserError(f"{name}: class '{classes[unseen[0]]}' has {of} images but none to train on; add some, "
                      "or leave it out")
  if len(labels) < 2:
    raise UserError(f"{name} has images of one class only, '{classes[min(labels)]}'; give it two or more")
  return Source(train, valid, tuple(classes), fingerprint("images", (train, valid), _content))


def split(images: Sequence[dict], valid_share: float, name: str) -> tuple[list[dict], list[dict]]:
  """(train, valid): of each class the images whose hashes are smallest, `valid_share` of them, at least one.

  So the split does not depend on names, order or seeds, and copies of an image stay on one side.
  """
  if not 0 < valid_share < 1:
    raise UserError(f"data.valid_share={valid_share:g} must be between 0 and 1, say 0.2; "
                    f"without it {name} has no validation images")
  return split_by_class(images, lambda image: image_files.content(image["image"]), valid_share)


@functools.cache
def digits() -> tuple[list[dict], list[str]]:
  """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels in 17 greys (UCI, Alpaydin and Kaynak 1998)."""
  from sklearn.datasets import load_digits

  digits = load_digits()
  grey_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
  return [dict(image=np.repeat(grey_HW[..., None], 3, axis=2), label=int(label), name=f"digit {i}")
          for i, (grey_HW, label) in enumerate(zip(grey_NHW, digits.target))], [str(d) for d in range(10)]


def _clean(images: Any, name: str, skip_unreadable: bool) -> list[dict]:
  """A list of well-formed images that can be read; `name` is what messages call the source."""
  clean, unreadable = [], []
  for i, d in items_of(images, name, "image"):
    if not isinstance(d, dict) or "image" not in d or "label" not in d:
      raise UserError(f"{name}: image {i} is of type {type(d).__name__}, without 'image' and 'label'; give a "
                      "dict with both")
    label, called = d["label"], str(d.get("name", i))
    if not isinstance(label, numbers.Integral) or label < 0:
      raise UserError(f"{name}: image {called} has label {label!r}; give a whole number from 0 on")
    d = dict(image=d["image"], label=int(label), name=called)
    try:
      d["edge"] = min(image_files.decode(d["image"]).size)  # pixels
    except image_files.Unreadable as e:
      unreadable.append(f"{called} ({e})")
      continue
    clean.append(d)
  if unreadable:
    why = f"{name}: {len(unreadable)} of {len(unreadable) + len(clean)} images cannot be read: " + ", ".join(
        unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
    if not skip_unreadable:
      raise UserError(f"{why}; mend or remove them, or leave them out with data.image.skip_unreadable=true")
    logging.warning("%s; left out", why)
  return clean


def _content(image: dict) -> bytes:
  """What a fingerprint counts: the label and the pixels or the file."""
  raw = image_files.content(image["image"])
  return b"%d %d " % (image["label"], len(raw)) + raw
