"""The generated scenes with captions as short as can be: "red circle above blue square", 5 or 6 words."""

from typing import Any

from sparse_experts.data.pairs import scenes

_LEFT_OUT = {"a", *scenes.SIZES}


def source(config_data: Any) -> list[dict]:
  del config_data
  short = lambda text: b" ".join(word for word in text.split() if word.decode() not in _LEFT_OUT)
  return [pair | {"text": short(pair["text"])} for pair in scenes.scenes()]
