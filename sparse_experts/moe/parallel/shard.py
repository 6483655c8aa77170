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


def spread(call: Callable[..., Any], by_group: Any, experts: nnx.Module, same: tuple = (),
           exchange_rows_factor: float | None = None) -> Any:
  """`call(experts_as, by_group, *same)` on every device's groups; its results have groups first, too.

  by_group: arrays with groups first. same: arrays that all devices have. `experts_as(ExchangedExperts)` are
  the experts, wherever they are; without a mesh those given.
  """
  sizes = mesh_sizes()
  if not sizes:
    return call(lambda kind: experts, by_group, *same)
  groups, G = _groups(sizes), jax.tree.leaves(by_group)[0].shape[0]
  graphdef, state = nnx.split(experts)
  variables = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
  specs = [_only(partitioning.spec(v.axes), sizes) for v in variables]
  weights, structure = jax.tree.flatten(state)
  if not any("model" in spec for spec in specs):
    sizes.pop("model", None)  # every device along it does the same

  def on_device(by_group, weights, same):
    weights = [_vary(w, spec, sizes) for w, spec in zip(weights, specs, strict=True)]
    mine = nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
    return call(lambda kind: kind(mine, sizes, exchange_rows_factor), by_group, *same)

  outputs = jax.shard_map(
      on_device, mesh=partitioning.current_mesh(), in_specs=(groups, specs, P()), out_specs=groups,
  )(_whole(by_group, sizes), weights, same)
  return jax.tree.map(lambda a: a[:G], outputs)


def by_group(function: Callable[..., Any], *arrays: Array) -> Any:
  """`function(*arrays)`, all with groups first, on each device's own groups; groups of zeros may be added.

  For routers that loop until their groups are done: the compiler would let all devices agree in every round.
  """
  sizes = mesh_sizes()
  if not sizes:
    return function(*arrays)
  groups, G = _groups(sizes), arrays[0].shape[0]
  call = jax.shard_map(function, mesh=partitioning.current_mesh(), in_specs=groups, out_specs=groups)
  return jax.tree.map(lambda a: a[:G], call(*_whole(arrays, sizes)))


def mesh_sizes() -> dict[str, int]:
  """The current mesh's axes that are larger than 1."""
  mesh = partitioning.current_mesh()
  return {} if mesh is None else {name: n for name, n in mesh.shape.items() if n > 1}


def _groups(sizes: dict[str, int]) -> P:
  """Groups spread over data x expert."""
  return P(tuple(a for a in partitioning.BATCH_AXES if a in sizes) or None)


def num_shards(sizes: dict[str, int]) -> int:
  return math.prod(sizes.get(a, 1) for a in partitioning.BATCH_AXES)


def _whole(tree: Any, sizes: dict[str, int]) -> Any:
  """With groups of zeros added until they divide over the devices."""
  pad = lambda a: jnp.pad(a, ((0, -a.shape[0] % num_shards(sizes)),) + ((0, 0),) * (a.ndim - 1))
  return jax.tree.map(pad, tree)


def _only(spec: P, sizes: dict[str, int]) -> P:
  """`spec` without mesh axes of size 1."""
  return P(*(axis if axis in sizes else None for axis in spec))


def _vary(w: Array, spec: P, sizes: dict[str, int]) -> Array:
  """Marks a weight as varying over all mesh axes; the transpose of that is the sum of its gradient."""
  axes = tuple(a for a in sizes if a not in spec)
  return jax.lax.pcast(w, axes, to="varying") if axes else w
