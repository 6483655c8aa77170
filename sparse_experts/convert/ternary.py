"""A run's ternary experts as they compute, four weights a byte, with the rest of its parameters; and back.

A folder has a safetensors file and config.json. Names are the run's own, as `describe --parameters` lists
them. An expert matrix NAME [E, D, F] is NAME.codes, uint8 [E, ceil(D F / 4)], and NAME.value, float32 [E]:
weight i of an expert in row order is (bits 2 (i mod 4) and the next of byte i // 4, minus 1) times its value.
Everything else is float32 of the run's shape.
"""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_experts.config import ConfigDict, flat
from sparse_experts.convert.files import CONFIG, Folder, read_json
from sparse_experts.convert.write import SHARD_BYTES, Make, Specs, export
from sparse_experts.data import Vocabulary
from sparse_experts.errors import UserError
from sparse_experts.moe.ternary_experts import codes

NAME = "ternary"  # of the format, as --layout and config.json's model_type have it
CODES, VALUE = ".codes", ".value"
MATRICES = ("w_in", "w_gate", "w_out")  # of `TernaryExperts`


def write(workdir: str, folder: str, *, step: int | None = None, shard_bytes: int = SHARD_BYTES) -> int:
  """Writes a run with ternary experts to a new folder; returns the step. Refuses a run without."""

  def fields(config: ConfigDict, tokenizer: Vocabulary) -> dict[str, Any]:
    if config.model.expert_weights != "ternary":
      raise UserError(f"--layout={NAME} packs ternary experts, but the run in {workdir} has model."
                      f"expert_weights='{config.model.expert_weights}'; train one with "
                      "--config.model.expert_weights=ternary, or name another layout")
    return {"model_type": NAME, "vocab_size": tokenizer.vocab_size, "shapes": {},
            "config": {key: value for key, value in flat(config).items() if key.startswith("model.")}}

  def plan(config: ConfigDict, shapes: dict[str, Any], fields: dict[str, Any]) -> tuple[Specs, Make]:
    specs: Specs = {}
    for name, shape in shapes.items():
      if not _is_packed(name):
        specs[name] = jnp.dtype("float32"), shape
        continue
      fields["shapes"][name] = list(shape)
      specs[name + CODES] = jnp.dtype("uint8"), (shape[0], -(-shape[1] * shape[2] // 4))
      specs[name + VALUE] = jnp.dtype("float32"), shape[:1]
    return specs, _make

  return export(workdir, folder, step, shard_bytes, fields, plan)


def read(folder: str) -> dict[str, np.ndarray]:
  """{name: array} of the run's shapes: experts as codes times values, what the run multiplies by."""
  path, content = os.path.join(folder, CONFIG), read_json(os.path.join(folder, CONFIG))
  shapes = content.get("shapes")
  if content.get("model_type") != NAME or not isinstance(shapes, dict):
    raise UserError(f"{path} is not of ternary experts; name a folder that convert --layout={NAME} wrote")
  there = Folder(folder)
  found = {name: np.array(there.read(name)) for name in there.tensors if not name.endswith((CODES, VALUE))}
  for name, shape in shapes.items():
    if not {name + CODES, name + VALUE} <= there.tensors.keys():
      raise UserError(f"{folder} lacks {name}{CODES} or {name}{VALUE}, which {path} names; write it again")
    code = unpack(there.read(name + CODES), tuple(shape))
    found[name] = code * there.read(name + VALUE)[:, None, None]
  return found


def pack(code_EDF: np.ndarray) -> np.ndarray:
  """-1, 0 and 1 as bytes of four, [E, ceil(D F / 4)]; what fills up the last byte stands for 0."""
  two_bits = np.asarray(code_EDF + 1, np.uint8).reshape(len(code_EDF), -1)
  two_bits = np.pad(two_bits, ((0, 0), (0, -two_bits.shape[1] % 4)), constant_values=1)
  return (two_bits.reshape(len(code_EDF), -1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(-1, dtype=np.uint8)


def unpack(byte_EB: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
  """The inverse of `pack`, float32 of that shape. Refuses bytes that hold no codes of that many."""
  E, D, F = shape
  code = (byte_EB[..., None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
  if byte_EB.shape != (E, -(-D * F // 4)) or (code == 3).any():
    raise UserError(f"codes of shape {byte_EB.shape} are not of ternary weights {shape}; write them again")
  return code.reshape(E, -1)[:, :D * F].reshape(shape).astype(np.float32) - 1


def _is_packed(name: str) -> bool:
  return name.partition("/ffn/experts/")[2] in MATRICES


def _make(name: str, own: dict[str, np.ndarray]) -> np.ndarray:
  """The tensor of that name from the run's arrays."""
  base, packed, end = name.rpartition(".")
  if not packed or "." + end not in (CODES, VALUE):
    return np.asarray(own[name], np.float32)
  code_EDF, value_E11 = codes(jnp.asarray(own[base]))  # as the layer computes them
  return pack(np.asarray(code_EDF)) if "." + end == CODES else np.asarray(value_E11)[:, 0, 0]
