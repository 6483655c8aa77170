"""A stack of layers: each segment's blocks are stacked by vmap over their keys and run by one scan."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_experts.models import segments as seg
from sparse_experts.models.blocks import Context
from sparse_experts.models.template import Buffers, Params, Routings, Template, Tree, fold
from sparse_experts.moe import MoELayer
from sparse_experts.partitioning import is_axes


class Stack:
  """Layers of the given kinds, hashable; `make_block(kind, key)` builds one, as `Block` is. Holds no arrays.

  Params and buffers are `{segment: {position: block's}}`, each array with the repeats first.
  """

  def __init__(self, name: str, kinds: Sequence[Any], make_block: Callable[[Any, jax.Array], Any],
               remat: bool = False):
    self.name, self.kinds, self.remat = name, tuple(kinds), remat
    self.segments = seg.find_segments(kinds)
    made = {kind: Template(functools.partial(make_block, kind)) for kind in set(kinds)}
    self.templates = [[made[kind] for kind in pattern] for pattern, _ in self.segments]

  def where(self, layer: int) -> tuple[int, int, int]:
    """(segment, repeat, position) of a layer."""
    return seg.where(self.segments, layer)

  def layer_name(self, layer: int) -> str:
    return f"{self.name}/{layer:02d}"

  def part_name(self, layer: int, part: str) -> str:
    """The name of a sparse layer: its layer's, unless it is in the attention."""
    return self.layer_name(layer) + ("" if part == "ffn" else f"/{part}")

  def block(self, layer: int) -> Any:
    """The layer's block without arrays."""
    s, _, position = self.where(layer)
    return self.templates[s][position].module

  def arrays(self, tree: Tree, layer: int) -> Tree:
    """The layer's own arrays in a tree with the layout of params."""
    s, repeat, position = self.where(layer)
    return jax.tree.map(lambda a: a[repeat], tree[str(s)][str(position)])

  def _layers(self, s: int) -> np.ndarray:
    """Layer index of each [repeat, position] of a segment."""
    first = sum(len(pattern) * repeats for pattern, repeats in self.segments[:s])
    pattern, repeats = self.segments[s]
    return first + np.arange(repeats * len(pattern), dtype=np.int32).reshape(repeats, len(pattern))

  @property
  def axes(self) -> Tree:
    return {str(s): {str(i): jax.tree.map(lambda axes: ("layers", *axes), template.axes,
                                          is_leaf=is_axes)
                     for i, template in enumerate(templates)} for s, templates in enumerate(self.templates)}

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """Keys are folded by layer index, so a layer's values do not depend on the segments."""
    params: Params = {}
    buffers: Buffers = {}
    for s, templates in enumerate(self.templates):
      for i, template in enumerate(templates):
        keys = jax.vmap(lambda layer: fold(key, layer))(self._layers(s)[:, i])
        p, b = jax.vmap(template.init)(keys)
        params.setdefault(str(s), {})[str(i)] = p
        if b:
          buffers.setdefault(str(s), {})[str(i)] = b
    return params, buffers

  def __call__(self, params: Params, buffers: Buffers, x_BLD: jax.Array, context: Context, *,
               caches: Tree | None = None, key: jax.Array | None = None, trace: bool = False,
               edits: Tree | None = None) -> tuple[jax.Array, Routings, Tree | None]:
    """(x_BLD, routing of each sparse layer by name, caches); without `trace` routings hold no lists.

    `caches` has the layout of params. `edits`: for each sparse layer by name, [B, L] arrays of one
    structure for the layers' `edit`.
    """
    routings: Routings = {}
    new_caches: Tree = {}

    def run(template, arrays, x_BLD, cache, key, edits):
      at = context if edits is None else context.replace(edits=edits)
      x_BLD, parts, cache = template.bind(*arrays)(x_BLD, at, cache, key)
      return x_BLD, parts if trace else {part: r.only_stats() for part, r in parts.items()}, cache

    for s, templates in enumerate(self.templates):
      repeats = self.segments[s][1]
      # Each block separately, or the backward pass holds a whole pattern; a scan's body is safe from CSE.
      call = jax.checkpoint(run, prevent_cse=repeats == 1, static_argnums=0) if self.remat else run

      def repeat(x_BLD, xs, templates=templates, call=call):
        params, buffers, caches, layers, edits = xs
        found: Tree = {}
        for i, template in enumerate(templates):
          own, at = fold(key, layers[i]), str(i)
          x_BLD, found[at], cache = call(
              template, (params[at], buffers.get(at)), x_BLD, caches.get(at), own, edits.get(at))
          if cache is not None:
            caches[at] = cache
        return x_BLD, (found, caches)

      xs = (params[str(s)], buffers.get(str(s), {}), (caches or {}).get(str(s), {}), self._layers(s),
            self._by_position(edits, s) if edits else {})
      x_BLD, (found, new_caches[str(s)]) = jax.lax.scan(repeat, x_BLD, xs)
      for i, parts in found.items():
        for part, stacked in parts.items():
          for r in range(repeats):
            name = self.part_name(int(self._layers(s)[r, int(i)]), part)
            routings[name] = jax.tree.map(lambda a, r=r: a[r], stacked)
    return x_BLD, dict(sorted(routings.items())), new_caches if caches is not None else None

  def _by_position(self, by_layer: dict[str, Any], s: int) -> Tree:
    """Values by layer name, stacked as the scan of segment s reads them: the repeats first."""
    stack = lambda layers, part: jax.tree.map(
        lambda *a: jnp.stack(a), *[by_layer[self.part_name(int(n), part)] for n in layers])
    return {str(i): {part: stack(layers, part) for part in template.module.sparse_parts}
            for i, (layers, template) in enumerate(zip(self._layers(s).T, self.templates[s], strict=True))}

  def each(self, params: Params, buffers: Buffers, call: Callable[[Any], Any]) -> Tree:
    """`call(block)` of every layer, in the layout of params."""
    results: Tree = {}
    for s, templates in enumerate(self.templates):
      for i, template in enumerate(templates):
        arrays = params[str(s)][str(i)], buffers.get(str(s), {}).get(str(i), {})
        result = jax.vmap(lambda p, b, template=template: call(template.bind(p, b)))(*arrays)
        results.setdefault(str(s), {})[str(i)] = result
    return results

  @property
  def sparse_layers(self) -> dict[str, MoELayer]:
    """Name -> sparse layer, without arrays."""
    return {self.part_name(n, part): layer for n in range(len(self.kinds))
            for part, layer in self.block(n).sparse_parts.items()}

  def next_buffers(self, params: Params, buffers: Buffers, sums: dict[str, Any]) -> Tree:
    """Router state after an optimizer step, from the new params and each layer's summed metrics and stats."""
    new: Tree = {}
    for s, in_segment in buffers.items():
      for i, state in in_segment.items():
        new.setdefault(s, {})[i] = dict(state)
        for part, layer in self.templates[int(s)][int(i)].module.sparse_parts.items():
          path = ("attention", "projection", "router") if part == "attention" else ("ffn", "router")
          if (old := _at(state, path)) is None:
            continue
          names = [self.part_name(int(n), part) for n in self._layers(int(s))[:, int(i)]]
          of_layers = [(sums[name]["metrics"], sums[name]["stats"]) for name in names]
          stacked = jax.tree.map(lambda *a: jnp.stack(a), *of_layers)
          router_state = jax.vmap(layer.router.next_state)(old, _at(params[s][i], path) or {}, *stacked)
          new[s][i] = _put(new[s][i], path, router_state)
    return new


def _at(tree: Tree, path: tuple[str, ...]) -> Tree | None:
  for name in path:
    tree = tree.get(name, {})
  return tree or None


def _put(tree: Tree, path: tuple[str, ...], leaf: Tree) -> Tree:
  """`tree` with another sub-tree at `path`."""
  name, *rest = path
  return {**tree, name: _put(tree[name], tuple(rest), leaf) if rest else leaf}
