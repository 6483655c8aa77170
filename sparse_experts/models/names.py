"""Names of parameters by layer, the same in every model that has the layer, whatever its segments.

`decoder/03/ffn/router/w` is the fourth layer's row of an array in which layers are stacked. Names come from
the tree alone, so a checkpoint's arrays have them too: a stack lies under `blocks` as
`{segment: {position: block's}}`, its arrays with the repeats first (`Stack`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

Shape = tuple[int, ...]
PARTS = ("params", "buffers")  # of a state, what a model is


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a named parameter lies: the array at `path`, or its row `repeat` if layers are stacked there."""

  path: tuple[str, ...]
  repeat: int | None = None


def by_path(tree: Any) -> dict[tuple[str, ...], Any]:
  """Arrays of nested dicts by their keys."""
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): x for path, x in found}


def places(tree: Any, params: Any = None) -> dict[str, Place]:
  """Name -> place of everything in `tree`, in its order.

  params: whose layers `tree` has, if it is not the parameters itself: buffers are there for some only.
  """
  layers = _layers(tree if params is None else params)
  found = {}
  for path in by_path(tree):
    segment = path[:3]
    if segment not in layers:
      found["/".join(path)] = Place(path)
      continue
    first, pattern, repeats = layers[segment]
    for r in range(repeats):
      layer = first + r * pattern + int(path[3])
      found["/".join((path[0], f"{layer:02d}", *path[4:]))] = Place(path, r)
  return found


def shapes(tree: Any, params: Any = None) -> dict[str, Shape]:
  """Name -> shape of that parameter alone, without the axis of stacked layers."""
  arrays = by_path(tree)
  return {name: tuple(arrays[at.path].shape)[at.repeat is not None:]
          for name, at in places(tree, params).items()}


def state_places(state: dict[str, Any]) -> dict[str, Place]:
  """`places` of a state's parameters and buffers; paths start with which they are."""
  return {name: Place((part, *at.path), at.repeat) for part in PARTS
          for name, at in places(state.get(part, {}), state["params"]).items()}


def state_shapes(state: dict[str, Any]) -> dict[str, Shape]:
  """`shapes` of a state's parameters and buffers."""
  return {name: shape for part in PARTS
          for name, shape in shapes(state.get(part, {}), state["params"]).items()}


def difference(there: Mapping[str, Any], here: Mapping[str, Any], most: int = 3) -> str:
  """The first names, in order, that are not there and here with the same shape or type; empty if all are."""
  differ = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
  words = [f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
          for name in differ[:most]]
  return ", ".join(words) + (f" and {len(differ) - most} more differ" if len(differ) > most else "")


def _layers(params: Any) -> dict[tuple[str, ...], tuple[int, int, int]]:
  """Path of each segment -> (its first layer, layers of its pattern, repeats)."""
  positions: dict[tuple[str, ...], dict[str, int]] = {}
  for path, x in by_path(params).items():
    if len(path) > 4 and path[1] == "blocks":
      positions.setdefault(path[:3], {})[path[3]] = x.shape[0]
  layers, first = {}, dict[str, int]()
  for segment in sorted(positions, key=lambda path: (path[:2], int(path[2]))):
    pattern, repeats = len(positions[segment]), next(iter(positions[segment].values()))
    layers[segment] = first.get(segment[0], 0), pattern, repeats
    first[segment[0]] = layers[segment][0] + pattern * repeats
  return layers
