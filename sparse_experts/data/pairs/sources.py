"""Sources of images with a text each: generated scenes, or anyone's function.

A pair is `{"image": uint8 [H, W, 3] or an image file's bytes, "text": str or UTF-8 bytes}`.
"""

import functools
from typing import Any

import numpy as np

from sparse_experts.data.images import files as image_files
from sparse_experts.data.pairs import scenes
from sparse_experts.data.sources import Source, fingerprint, items_of, open_named, two_parts
from sparse_experts.data.text.sources import split
from sparse_experts.errors import UserError


def open_source(config_data) -> Source:
  """The source `config_data.source` names; if it has no validation part, `valid_share` is held out."""
  if config_data.source.partition(":")[0] in ("files", "tfds"):
    raise UserError(f"data.source='{config_data.source}' holds no pairs of image and text; write a function "
                    "that reads them, data.source=package.module:function, or choose embedded")
  pairs, _ = open_named(config_data, {"embedded": lambda: (scenes.scenes(), ())})
  return as_source(pairs, config_data)


def as_source(pairs: Any, config_data, name: str | None = None) -> Source:
  """Anything with pairs as a Source: a sequence of dicts, or an object with `.train` and `.valid`.

  A sequence is split by a hash of the texts: no text is on both sides, and names and order do not matter.
  """
  name = f"data.source='{config_data.source}'" if name is None else name
  train, valid = two_parts(pairs, _clean, functools.partial(split, valid_share=config_data.valid_share), name)
  for part, of in ((train, "training"), (valid, "validation")):
    if len(part) < 2:
      raise UserError(f"{name} has {len(part)} {of} pairs, none to tell one from; give it more with "
                      f"different texts, or another data.valid_share={config_data.valid_share:g}")
  return Source(train, valid, (), fingerprint("pairs", (train, valid), _content))


def _clean(pairs: Any, name: str) -> list[dict]:
  """A list of well-formed pairs whose images can be read; `name` is what messages call the source."""
  clean = []
  for i, d in items_of(pairs, name, "pair"):
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


def _content(pair: dict) -> bytes:
  """What a fingerprint counts: the text, and the pixels or the image file."""
  raw = pair["image"]
  raw = raw if isinstance(raw, bytes) else b"%d %d " % raw.shape[:2] + np.ascontiguousarray(raw).tobytes()
  return b"%d " % len(pair["text"]) + pair["text"] + b"%d " % len(raw) + raw
