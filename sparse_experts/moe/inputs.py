"""What a sparse layer may be called with; another shape or type is one line that says what was expected."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from sparse_experts.errors import UserError
from sparse_experts.moe.routing import Tokens


def check_input(x: Any, tokens: Any, experts: Any, num_heads: int = 1) -> tuple[int, int, Tokens]:
  """(rows, their length, tokens with a mask); refuses shapes and types that no layer takes.

  num_heads: of each token, which the experts get one by one.
  """
  shape, d = jnp.shape(x), _width(experts)
  d = None if d is None else d * num_heads
  if len(shape) != 3 or d not in (None, shape[-1]):
    way_out = "; for one row give x[None]" if len(shape) == 2 and d in (None, shape[-1]) else (
        "; give vectors of that width" if len(shape) == 3 else "")
    raise UserError(f"x has shape {shape}, but the layer takes [rows, tokens, {d or 'width'}]{way_out}")
  if tokens is not None and not isinstance(tokens, Tokens):
    raise UserError(f"tokens is of type {type(tokens).__name__}, not Tokens; for a mask give "
                    "Tokens(mask=...), of sparse_experts.moe")
  tokens = tokens or Tokens()
  for field in dataclasses.fields(tokens):
    value = getattr(tokens, field.name)
    if value is not None and jnp.shape(value) != shape[:2]:
      raise UserError(f"tokens.{field.name} has shape {jnp.shape(value)}, but x has {shape[0]} rows of "
                      f"{shape[1]} tokens; give it shape {shape[:2]}")
  if tokens.mask is None:
    tokens = tokens.replace(mask=jnp.ones(shape[:2], bool))
  elif (kind := jnp.asarray(tokens.mask).dtype) != jnp.bool_:
    raise UserError(f"tokens.mask is of type {kind}; give True where a token is real, as mask > 0 does")
  return shape[0], shape[1], tokens


def _width(experts: Any) -> int | None:
  """The width of a token's vector, where the experts are of the package's kind: w_in is [E, D, F]."""
  shape: tuple[int, ...] = getattr(getattr(experts, "w_in", None), "shape", ())
  return shape[1] if len(shape) == 3 else None
