"""Split a module into its graph and its arrays: nested dicts outside, an nnx module while it is called."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from sparse_experts.moe import Routing
from sparse_experts.moe.keys import fold as fold  # it names the parameters of a model, too

Made = TypeVar("Made")
Tree = dict[str, Any]
Params = Tree  # of a model: what gradients move, nested as its parts are
Buffers = Tree  # what they do not touch
Batch = dict[str, Any]  # fields of records, a row each; on the host or on devices
Routings = dict[str, Routing]  # of sparse layers by name


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(map(str, path))  # an index in a list, too: a checkpoint's keys are text


class Template(Generic[Made]):
  """`make(key)`, which gives a module, evaluated abstractly once: no arrays are held.

  params are the `nnx.Param`s, buffers all other variables. A variable without `axes` is replicated.
  """

  def __init__(self, make: Callable[[jax.Array], Made]):
    self._make = make
    self._graphdef, state = jax.eval_shape(lambda key: nnx.split(make(key)), jax.random.key(0))
    self._variables = nnx.to_flat_state(state)

  @property
  def module(self) -> Made:
    """The module with shapes in place of arrays: for reading its static fields."""
    return nnx.merge(self._graphdef, nnx.from_flat_state(self._variables))

  @property
  def axes(self) -> Tree:
    """Logical axes of params, checked against their ranks."""
    found = {}
    for path, variable in self._variables:
      if isinstance(variable, nnx.Param):
        shape = variable.get_value().shape
        axes = variable.get_metadata().get("axes", (None,) * len(shape))
        if len(axes) != len(shape):
          raise ValueError(f"parameter {'/'.join(map(str, path))} has shape {shape} but axes {axes}")
        found[_keys(path)] = tuple(axes)
    return unflatten_dict(found)

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """(params, buffers) of `make(key)`."""
    _, *states = nnx.split(self._make(key), nnx.Param, ...)
    params, buffers = ({_keys(path): v.get_value() for path, v in nnx.to_flat_state(s)} for s in states)
    return unflatten_dict(params), unflatten_dict(buffers)

  def bind(self, params: Tree, buffers: Tree | None = None) -> Made:
    """The module holding these arrays."""
    arrays = flatten_dict(params) | flatten_dict(buffers or {})
    return nnx.merge(self._graphdef, nnx.from_flat_state(
        [(path, v.replace(arrays[_keys(path)])) for path, v in self._variables]))
