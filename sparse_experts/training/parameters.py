"""A run's parameters by the names that `describe --parameters` lists, one of each layer: read, and set."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sparse_experts.errors import UserError, nearest
from sparse_experts.models import names

State = dict[str, Any]  # {"params": ..., "buffers": ...}


def named(state: State) -> dict[str, jax.Array]:
  """{name: array} of parameters and buffers; layers that are stacked are taken apart."""
  arrays = names.by_path(state)
  return {name: arrays[at.path] if at.repeat is None else arrays[at.path][at.repeat]
          for name, at in names.state_places(state).items()}


def replaced(state: State, values: Mapping[str, Any]) -> State:
  """A copy of the state in which these are set, in their own types and shardings; the rest is shared.

  Raises UserError for a name that is not there, another shape and values that are not finite.
  """
  places, arrays = names.state_places(state), names.by_path(state)
  for name, value in values.items():
    if name not in places:
      raise UserError(f"there is no parameter '{name}'{nearest(name, places)}")
    at = places[name]
    old, new = arrays[at.path], np.asarray(value)
    shape = tuple(old.shape)[at.repeat is not None:]
    if new.shape != shape:
      raise UserError(f"parameter {name} has shape {shape}, the value {new.shape}; give it that shape")
    if not np.isfinite(new.astype(np.float32)).all():
      raise UserError(f"the value of parameter {name} is not finite everywhere; mend it")
    new = new.astype(old.dtype) if at.repeat is None else old.at[at.repeat].set(new.astype(old.dtype))
    arrays[at.path] = jax.device_put(new, old.sharding)
  return jax.tree.unflatten(jax.tree.structure(state), list(arrays.values()))
