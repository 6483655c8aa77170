"""Sources of images with a text each: generated scenes, or anyone's function.

A pair is `{"image": uint8 [H, W, 3] or an image file's bytes, "text": str or UTF-8 bytes}`.
"""

from typing import Any

from sparse_experts.data.images import files as image_files
from sparse_experts.data.pairs import scenes
from sparse_experts.data.sources import Source, called, fingerprint, items_of, open_named, two_parts
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
  train, valid = two_parts(
      pairs, config_data, called(config_data, name), _clean, split, items="pairs, none to tell one from",
      wanted="more with different texts", least=2)
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
  raw = image_files.content(pair["image"])
  return b"%d " % len(pair["text"]) + pair["text"] + b"%d " % len(raw) + raw
