"""8-bit matrices and their scales, as DeepSeek-V3's files and transformers' `fp8` hold them.

`NAME_scale_inv` holds the factors of the tensor NAME: one for each block of rows and columns (those at the
edges may be smaller), one for each row, or one for all.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sparse_experts.errors import UserError

SUFFIX = "_scale_inv"


@dataclasses.dataclass(frozen=True)
class Rule:
  """How config.json says that 8-bit matrices are scaled.

  block: rows and columns that share a scale; None: all do. Whatever the block, a scale for each row and one
    for all are seen by their shape.
  stated: whether config.json says that tensors are quantised; if not, those without a scale stay as they are.
  """

  block: tuple[int, int] | None = (128, 128)
  stated: bool = False


def pair(tensors: dict, rule: Rule, path: str) -> dict:
  """Takes the scales out of {name: tensor} and gives {name of an 8-bit tensor: its scale}.

  Refuses scales of another shape than the rule's, and, where the rule is stated, 8-bit tensors without one.
  """
  scales = {}
  for name, tensor in tensors.items():
    if tensor.dtype.itemsize > 1:
      continue
    scale = tensors.get(name + SUFFIX)
    if scale is None and rule.stated:
      raise UserError(f"{path}: {name} has 8 bits, but {name}{SUFFIX} is not there; fetch the files again")
    if scale is None:
      continue
    shapes = _shapes(tensor.shape, rule)
    if scale.shape not in shapes or not jnp.issubdtype(scale.dtype, jnp.floating):
      wanted = " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes))
      raise UserError(f"{path}: {name}{SUFFIX} is {scale.dtype} {list(scale.shape)}, but weight_block_size="
                      f"{rule.block and list(rule.block)} of a matrix {list(tensor.shape)} needs a float "
                      f"{wanted}; mend quantization_config in config.json")
    scales[name] = scale
  for name in scales:
    del tensors[name + SUFFIX]
  return scales


def _shapes(shape: tuple[int, ...], rule: Rule) -> list[tuple[int, ...]]:
  """Shapes that the scale of a tensor may have; its last two axes are rows and columns."""
  if len(shape) < 2:
    return [(), (1,)]
  *lead, R, C = shape
  rows, columns = (R, C) if rule.block is None else rule.block
  return [(*lead, -(-R // rows), -(-C // columns)), (*lead, R, 1), (), (1,)]


def scaled(values: np.ndarray, scale: np.ndarray, rule: Rule) -> np.ndarray:
  """float32 values times their scales, in memory; the scale's shape is one that `pair` lets through."""
  values, scale = values.astype(np.float32), scale.astype(np.float32)
  if rule.block is None or scale.shape != _shapes(values.shape, rule)[0]:
    return values * scale
  rows, columns = rule.block
  flat = values.reshape(-1, *values.shape[-2:])
  for matrix, factors in zip(flat, scale.reshape(len(flat), *scale.shape[-2:]), strict=True):
    for i, row in enumerate(factors):
      matrix[i * rows:(i + 1) * rows] *= np.repeat(row, min(columns, matrix.shape[1]))[:matrix.shape[1]]
  return values
