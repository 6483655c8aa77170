"""Sources of images with a text each: generated scenes, or anyone's function.

A pair is `{"image": uint8 [H, W, 3] or an image file's bytes, "text": str or UTF-8 bytes}`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_experts.data import sources
from sparse_experts.data.images import files as image_files
from sparse_experts.data.pairs import scenes
from sparse_experts.data.sources import Source, call_function, look_up
from sparse_experts.errors import UserError, nearest

OBJECTIVES = ("contrastive",)  # of `data.objective`: those that are about pairs


def open_source(config_data) -> Source:
  """The source `config_data.source` names; if it has no validation part, `valid_share` is held out."""
  name = config_data.source
  kind, colon, rest = name.partition(":")
  if name == "embedded":
    return as_source(scenes.scenes(), config_data)
  if kind in ("files", "tfds"):
    raise UserError(f"data.source='{name}' holds no pairs of image and text; write a function that reads "
                    "them, data.source=package.module:function, or choose embedded")
  if not colon or not rest:
    known = ["embedded", "package.module:function"]
    raise UserError(f"data.source='{name}' is unknown" + nearest(name, known))
  return as_source(call_function(name, kind, rest, config_data), config_data)


def as_source(pairs: Any, config_data, name: str | None = None) -> Source:
  """Anything with pairs as a Source: a sequence of dicts, or an object with `.train` and `.valid`."""
  name = f"data.source='{config_data.source}'" if name is None else name
  if hasattr(pairs, "train") and hasattr(pairs, "valid"):
    train, valid = (_clean(getattr(pairs, part), f"{name}.{part}") for part in ("train", "valid"))
  else:
    train, valid = split(_clean(pairs, name), config_data.valid_share, name)
  for part, of in ((train, "training"), (valid, "validation")):
    if len(part) < 2:
      raise UserError(f"{name} has {len(part)} {of} pairs, none to tell one from; give it more with "
                      f"different texts, or another data.valid_share={config_data.valid_share:g}")
  return Source(train, valid, (), _fingerprint(train, valid))


def split(pairs: Sequence[dict], valid_share: float, name: str) -> tuple[list[dict], list[dict]]:
  """(train, valid), by a hash of the texts: no text is on both sides, and names and order do not matter."""
  return sources.split(pairs, valid_share, name)


def _clean(pairs: Any, name: str) -> list[dict]:
  """A list of well-formed pairs whose images can be read; `name` is what messages call the source."""
  clean = []
  for i, d in look_up(pairs, name, "pair"):
    if not isinstance(d, dict) or not isinstance(text := d.get("text"), str | bytes) or "image" not in d:
      raise UserError(f"{name}: pair {i} is of type {type(d).__name__}, without 'image' and a 'text' of str "
                      "or bytes; give a dict with both")
    text = text.encode() if isinstance(text, str) else text
    if not text.strip():
      raise UserError(f"{name}: pair {i} has an empty text; leave it out")
    try:
      image_files.decode(d["image"])
    except image_files.Unreadable as e:
      raise UserError(
          f"{name}: the image of pair {i} cannot be read ({e}); mend it or leave it out") from None
    clean.append(dict(image=d["image"], text=text))
  return clean


def _fingerprint(*parts: Sequence[dict]) -> str:
  total = hashlib.sha256()
  for pairs in parts:
    total.update(b"pairs %d" % len(pairs))
    for pair in pairs:
      raw = pair["image"]
      raw = raw if isinstance(raw, bytes) else b"%d %d " % raw.shape[:2] + np.ascontiguousarray(raw).tobytes()
      for part in (pair["text"], raw):
        total.update(b"%d " % len(part) + part)
  return total.hexdigest()[:16]
