"""The layouts by name, which is config.json's model_type."""

from sparse_experts.convert.decoders import DeepSeekV3, Mixtral, OLMoE, Qwen2MoE, Qwen3MoE
from sparse_experts.convert.switch import Switch
from sparse_experts.errors import UserError, nearest

LAYOUTS = {layout.name: layout for layout in (Mixtral, OLMoE, Qwen2MoE, Qwen3MoE, DeepSeekV3, Switch)}


def get_layout(name: str, what: str):
  """A new layout of that name; it keeps what it reads from a config.json."""
  if name not in LAYOUTS:
    raise UserError(f"{what}'{name}' is no layout that is known{nearest(str(name), LAYOUTS)}")
  return LAYOUTS[name]()
