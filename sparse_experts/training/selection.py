"""Selects parameters by patterns over their names: those taken from another run, and those that train."""

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

import jax

from sparse_experts.config import ConfigDict
from sparse_experts.errors import UserError, nearest
from sparse_experts.models import names

SEE = "`describe --parameters` lists the names"


def choose(key: str, patterns: str, known: Iterable[str]) -> set[str]:
  """The names that `patterns` select: globs with commas between them; one that starts with `-` excludes.

  `*` stands for any text, also with '/'; exclusions alone select all others. `key` is for messages: each
  pattern must match a name, and the selection must not be empty.
  """
  known = list(known)
  parts = [part for part in map(str.strip, patterns.split(",")) if part]
  matched = {part: set(fnmatch.filter(known, part.removeprefix("-"))) for part in parts}
  for part, names_matched in matched.items():
    if not names_matched:
      like = nearest(part.removeprefix("-"), dict.fromkeys(re.sub(r"/\d+/", "/*/", n) for n in known))
      like = like if like.startswith("; did") else ""
      raise UserError(f"{key}='{patterns}': no parameter is called '{part.removeprefix('-')}'{like}; {SEE}")
  into = [part for part in parts if not part.startswith("-")]
  chosen = set().union(*(matched[part] for part in into)) if into else set(known) if parts else set()
  chosen -= set().union(*(matched[part] for part in parts if part not in into))
  if not chosen:
    raise UserError(f"{key}='{patterns}' leaves no parameter; give patterns such as '*,-embedding/*'; {SEE}")
  return chosen


def trained(config: ConfigDict, params: Any) -> Any:
  """Whether each array trains under `config.train.only`: a tree of bools like `params`.

  Layers that share an array train together or not at all.
  """
  patterns = config.train.only
  if patterns.strip() == "*":
    return jax.tree.map(lambda _: True, params)
  places = names.places(params)
  chosen = choose("train.only", patterns, places)
  sharing: dict[tuple[str, ...], list[str]] = {}
  for name, place in places.items():
    sharing.setdefault(place.path, []).append(name)
  for together in sharing.values():
    some, others = ([n for n in together if (n in chosen) == inside] for inside in (True, False))
    if some and others:
      raise UserError(
          f"train.only='{patterns}' names {some[0]} but not {others[0]}, which lies in the same array (that"
          f" of layers {', '.join(n.split('/')[1] for n in together)}); name all of these layers, or none")
  flags = [together[0] in chosen for together in sharing.values()]  # in the order of the tree
  return jax.tree.unflatten(jax.tree.structure(params), flags)


def trained_buffers(mask: Any, buffers: Any) -> Any:
  """Whether each buffer changes: it does not if all parameters of its module (a router) are frozen."""
  moves: dict[tuple[str, ...], bool] = {}
  for path, trains in names.by_path(mask).items():
    moves[path[:-1]] = moves.get(path[:-1], False) or trains
  flags = [moves.get(path[:-1], True) for path in names.by_path(buffers)]
  return jax.tree.unflatten(jax.tree.structure(buffers), flags)


def select(mask: Any, tree: Any) -> Any:
  """`tree` with None, which is not a leaf, where `mask` is False."""
  return jax.tree.map(lambda keep, x: x if keep else None, mask, tree)


def merge(chosen: Any, others: Any) -> Any:
  """`chosen`, and where it has None the leaves of `others`."""
  return jax.tree.map(lambda x, y: y if x is None else x, chosen, others, is_leaf=lambda x: x is None)
