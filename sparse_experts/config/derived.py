"""What follows from several keys together: a stack's routing, the tokens of a row, the seeds in use."""

from typing import Any

from ml_collections import ConfigDict

from sparse_experts.config.dotted import get
from sparse_experts.config.keys_run import SEEDS
from sparse_experts.errors import UserError


def routing_field(config: ConfigDict, prefix: str, name: str) -> tuple[str, Any]:
  """(full key, value) of a routing field of a stack: the decoder's where it is set, else the encoder's.

  prefix: `model.`, or `model.decoder.` for an encoder-decoder's decoder.
  """
  value = get(config, prefix + name)
  return ("model." + name, get(config, "model." + name)) if value is None else (prefix + name, value)


def layer_field(config: ConfigDict, layer: str, name: str) -> Any:
  """A routing field of the stack of a layer by its name, such as decoder/01."""
  own = config.model.name == "seq2seq" and layer.startswith("decoder/")
  return routing_field(config, "model.decoder." if own else "model.", name)[1]


def sparse_indices(num_layers: int, moe_every: int, moe_layers: tuple[int, ...]) -> tuple[int, ...]:
  """The layers of a stack that are sparse: `moe_layers`, or n-1, 2n-1, ... for n = `moe_every`."""
  return tuple(sorted(set(moe_layers or range(moe_every - 1, num_layers, moe_every))))


def image_tokens(config: ConfigDict) -> int:
  """Tokens of an image: its patches, and the class token if there is one."""
  size, patch = config.data.image.size, config.model.patch_size
  if patch < 1 or size % patch:
    near = sorted(sorted((p for p in range(1, size + 1) if size % p == 0), key=lambda p: abs(p - patch))[:3])
    raise UserError(f"model.patch_size={patch} does not divide data.image.size={size}; choose a patch of "
                    f"{' or '.join(map(str, near))} pixels, or another image size")
  return (size // patch)**2 + (config.model.pool == "token")


def seeds(config: ConfigDict) -> dict[str, int]:
  """The three seeds of a run: `config.seed.*`, each `config.train.seed` unless set."""
  return {n: config.train.seed if config.seed[n] is None else config.seed[n] for n in SEEDS}
