"""Run a function on every device's groups, with or without the experts that the device holds."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from sparse_experts import partitioning


def shard_experts(call: Callable[..., Any], by_group: Any, experts: nnx.Module, shared: tuple[Any, ...] = (),
                  rows_factor: float | None = None) -> Any:
  """`call(make_experts, by_group, *shared)` on every device, with its groups and its share of the experts.

  by_group: arrays with groups first, as the results of `call`. shared: arrays that all devices get whole.
  `make_experts(ExchangedExperts)`, or another class of its interface, gives all experts, of which the device
  holds some; without a mesh it gives `experts`. rows_factor: `MoELayer`'s exchange_rows_factor.
  """
  sizes = mesh_sizes()
  if not sizes:
    return call(lambda kind: experts, by_group, *shared)
  group_axes = tuple(axis for axis in partitioning.BATCH_AXES if axis in sizes)
  groups, G = P(group_axes or None), jax.tree.leaves(by_group)[0].shape[0]
  missing = -G % math.prod(sizes[axis] for axis in group_axes)  # groups of zeros, so that all divide
  pad = lambda a: jnp.pad(a, ((0, missing),) + ((0, 0),) * (a.ndim - 1))
  graphdef, state = nnx.split(experts)
  variables = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
  specs = [P(*(axis if axis in sizes else None for axis in partitioning.spec(v.axes))) for v in variables]
  weights, structure = jax.tree.flatten(state)
  if not any("model" in spec for spec in specs):
    sizes.pop("model", None)  # every device along it does the same

  def on_device(by_group, weights, shared):
    weights = [_vary(w, spec, sizes) for w, spec in zip(weights, specs, strict=True)]
    local = nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
    return call(lambda kind: kind(local, sizes, rows_factor), by_group, *shared)

  # A kernel does not say which mesh axes its results vary over.
  is_kernel = getattr(experts, "backend", None) == "tokamax"
  outputs = jax.shard_map(
      on_device, mesh=partitioning.current_mesh(), in_specs=(groups, specs, P()), out_specs=groups,
      check_vma=not is_kernel)(jax.tree.map(pad, by_group), weights, shared)
  return jax.tree.map(lambda a: a[:G], outputs)


def by_group(function: Callable[..., Any], *arrays: Array) -> Any:
  """`function(*arrays)` on each device's own groups, which are the first axis; groups of zeros may be added.

  For routers that loop until their groups are done: the compiler would let all devices agree in every round.
  """
  return shard_experts(lambda _, own_arrays: function(*own_arrays), arrays, nnx.Module())


def mesh_sizes() -> dict[str, int]:
  """The current mesh's axes that are larger than 1."""
  mesh = partitioning.current_mesh()
  return {} if mesh is None else {name: n for name, n in mesh.shape.items() if n > 1}


def _vary(w: Array, spec: P, sizes: dict[str, int]) -> Array:
  """Marks a weight as varying over all mesh axes; the transpose of that is the sum of its gradient."""
  axes = tuple(a for a in sizes if a not in spec)
  return jax.lax.pcast(w, axes, to="varying") if axes else w
