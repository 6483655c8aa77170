"""The layouts by name, which is config.json's model_type."""

from typing import Any

from sparse_experts.convert.decoders import DeepSeekV3, Mixtral, OLMoE, Qwen2MoE, Qwen3MoE
from sparse_experts.convert.fields import Fields
from sparse_experts.convert.published import ALIASES, PUBLISHED
from sparse_experts.convert.switch import Switch
from sparse_experts.errors import UserError, nearest

LAYOUTS = {layout.name: layout for layout in (Mixtral, OLMoE, Qwen2MoE, Qwen3MoE, DeepSeekV3, Switch)}


def get_layout(name: str, what: str):
  """A new layout of that name; it keeps what it reads from a config.json."""
  if name not in LAYOUTS:
    raise UserError(f"{what}'{name}' is no layout that is known{nearest(str(name), LAYOUTS)}")
  return LAYOUTS[name]()


def find_layout(content: dict[str, Any], path: str) -> tuple[Any, Fields]:
  """(layout, fields) of a foreign config.json; `path` is what messages call it."""
  if not isinstance(name := content.get("model_type"), str):
    raise UserError(f"{path} lacks 'model_type'; restore the file" if name is None else
                    f"{path}: model_type={name!r:.80} is not a string; restore the file")
  layout = get_layout(name, f"{path}: model_type=")
  return layout, fields_of(layout, content, path)


def fields_of(layout: Any, content: dict[str, Any], path: str) -> Fields:
  """The fields of a config.json of that layout."""
  return Fields(content, path, PUBLISHED[layout.name], ALIASES.get(layout.name, {}))
