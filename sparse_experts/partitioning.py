"""Meshes, the rules from logical axes to mesh axes, and shardings.

The only file that names `NamedSharding`. Outside `shard_map` the compiler chooses layouts (Auto axes);
inside (`moe/parallel/`) the code does.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_experts.errors import UserError, nearest

MESH_AXES = ("data", "expert", "model")
BATCH_AXES = ("data", "expert")  # rows of a batch, and routing groups, are sharded over both

# Logical axis -> mesh axes. An axis that is not here raises, so a misspelt one cannot pass as replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "expert": ("expert",),
    "mlp": ("model",),
    "heads": ("model",),
    "vocab": ("model",),
    # Images' classes too: their number need not divide.
    **dict.fromkeys(("classes", "embed", "layers", "head", "length", "buckets", "router"), ()),
}

Axes = tuple[str | None, ...]


def make_mesh(data: int = 1, expert: int = 1, model: int = 1, devices: Sequence[Any] | None = None,
              dcn: Mapping[str, int] | None = None) -> Mesh:
  """A mesh with axes data, expert, model over the first data x expert x model devices.

  dcn: number of slices of accelerators by axis, by default 1; sizes of axes are totals. Slices communicate
    over the data-centre network, so the slice is the outer part of the axis' index. Devices without a slice
    index, such as simulated ones, are divided into slices in their order.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape, cut = (data, expert, model), tuple((dcn or {}).get(axis, 1) for axis in MESH_AXES)
  if min(shape) < 1:
    raise UserError(f"mesh data={data} expert={expert} model={model}: each axis needs at least one device")
  for axis, size, parts in zip(MESH_AXES, shape, cut):
    if parts < 1 or size % parts:
      raise UserError(f"mesh.dcn.{axis}={parts} does not divide mesh.{axis}={size}; choose a divisor")
  need = math.prod(shape)
  if need > len(devices):
    raise UserError(
        f"mesh data={data} x expert={expert} x model={model} needs {need} devices, but there are"
        f" {len(devices)}; shrink config.mesh, or simulate devices with JAX_NUM_CPU_DEVICES={need}")
  grid = _arrange(_slices(devices, math.prod(cut), need), shape, cut)
  # axis_types written out: jax's own default has changed between versions.
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _slices(devices: list[Any], num_slices: int, need: int) -> list[list[Any]]:
  """The devices to use, an equal number of each slice."""
  by_slice: dict[int, list[Any]] = {}
  for device in devices:
    by_slice.setdefault(getattr(device, "slice_index", 0), []).append(device)
  if len(by_slice) == 1:
    devices = devices[:need]
    return [devices[i : i + need // num_slices] for i in range(0, need, need // num_slices)]
  smallest = min(map(len, by_slice.values()))
  if num_slices > len(by_slice) or need // num_slices > smallest:
    raise UserError(
        f"the devices are {len(by_slice)} slices of {smallest}, but config.mesh wants {num_slices} of "
        f"{need // num_slices}; say by config.mesh.dcn which axes are cut into slices, such as "
        f"config.mesh.dcn.data={len(by_slice)}")
  return [by_slice[i][: need // num_slices] for i in sorted(by_slice)[:num_slices]]


def _arrange(slices: list[list[Any]], shape: Sequence[int], cut: Sequence[int]) -> np.ndarray:
  """Devices by their index in the mesh; neighbours in a slice are neighbours in the mesh."""
  inner, blocks = [size // parts for size, parts in zip(shape, cut)], np.empty(cut, object)
  for where, part in zip(np.ndindex(*cut), slices):
    if part[0].device_kind == "TPU v4" and any(d.core_on_chip for d in part):
      # The compiler without a TPU lists both cores of a v4 chip; jax expects whole chips, as machines have.
      blocks[where] = np.array(part, object).reshape(inner)
      continue
    try:
      # Splitting changes nothing if the axes fit those of the torus, and is needed if they do not.
      blocks[where] = mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError) as e:  # a part of a torus that is no box
      raise UserError(f"{len(part)} devices of a slice do not make a mesh of {' x '.join(map(str, inner))} "
                      f"({str(e)[:100]}); use all devices of a slice") from None
  return np.block(blocks.tolist())


def use(mesh: Mesh):
  """Context manager: `constrain` and the sparse layers find the mesh by it."""
  return jax.set_mesh(mesh)


def current_mesh() -> AbstractMesh | None:
  """The mesh set by `use`, or None when there is none or it is one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
  """cpu, gpu or tpu: of the set mesh, whose devices need not be here (`compile`); without a mesh, of jax."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def spec(axes: Axes, fsdp: bool = False) -> PartitionSpec:
  """The PartitionSpec of logical `axes`.

  With `fsdp`, the `embed` axis of parameters without experts also spreads over (data, expert).
  Experts are already spread over `expert` and are never gathered over it.
  """
  entries = []
  for name in axes:
    if name is not None and name not in RULES:
      raise ValueError(f"unknown logical axis '{name}' in {axes}{nearest(name, RULES)}")
    mesh_axes = RULES[name] if name else ()
    if fsdp and name == "embed" and "expert" not in axes:
      mesh_axes = BATCH_AXES
    entries.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
  return PartitionSpec(*entries)


def is_axes(node: Any) -> bool:
  """Whether a node is a leaf of an axes tree: a tuple of logical names."""
  # Named tuples are nodes: optax's states are, some of them empty.
  return type(node) is tuple and all(n is None or isinstance(n, str) for n in node)


def shardings(axes_tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
  """NamedShardings of a tree whose leaves are tuples of logical axes."""
  return jax.tree.map(lambda axes: NamedSharding(mesh, spec(axes, fsdp)), axes_tree, is_leaf=is_axes)


def check_ranks(axes_tree: Any, arrays: Any) -> None:
  """Refuses a parameter whose logical axes do not match its rank (a stacked one lacking `layers`, say)."""

  def check(path, axes, array):
    if len(axes) != len(array.shape):
      raise ValueError(f"parameter {jax.tree_util.keystr(path)} has shape {array.shape} but axes {axes}")

  jax.tree_util.tree_map_with_path(check, axes_tree, arrays, is_leaf=is_axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over data x expert."""
  return NamedSharding(mesh, spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Asks the compiler to shard `x` by logical axes on the current mesh; without a mesh, `x`.

  An axis whose length its mesh axes do not divide is left to the compiler (a batch of one prompt).
  """
  mesh = current_mesh()
  if mesh is None:
    return x
  entries = list(spec(axes))
  for i, entry in enumerate(entries):
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    if x.shape[i] % math.prod(mesh.shape[n] for n in names):
      entries[i] = None
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def varying_like(x: jax.Array, *others: jax.Array) -> jax.Array:
  """`x`, a loop's first carry, marked as varying over the mesh axes that `others` vary over."""

  def axes(a):
    kind = jax.typeof(a)
    kind = getattr(kind, "manual_axis_type", kind)  # jax 0.10.2 against 0.12
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", frozenset())) or frozenset())

  missing = tuple(sorted(frozenset().union(*map(axes, others)) - axes(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x
