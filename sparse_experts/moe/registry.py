"""Routers by name. A new one is one file in `routers/` and one line in the table of `config.py`."""

import importlib
import inspect
import numbers
from typing import Any

from flax import nnx

from sparse_experts.config import ROUTERS as _WHERE
from sparse_experts.errors import UserError, nearest
from sparse_experts.moe.routers.top_k import TopKRouter
from sparse_experts.moe.routing.router import CAUSALITY, Router, router_metrics


def _load(where: str) -> type[Router]:
  module, _, attribute = where.partition(":")
  return getattr(importlib.import_module(module), attribute)


ROUTERS: dict[str, type[Router]] = {name: _load(f"sparse_experts.moe.routers.{where}") for name, where in _WHERE.items()}


def make_router(name: str, d: int, num_experts: int, *, rngs: nnx.Rngs, **arguments: Any) -> Router:
  """The router of that name, or of `package.module:Class`; `arguments` are its constructor's."""
  if ":" in name:
    try:
      cls = _load(name)
    except (ImportError, AttributeError) as error:
      raise UserError(
          f"router.name='{name}' cannot be imported: {error}; give package.module:Class") from error
  elif name in ROUTERS:
    cls = ROUTERS[name]
  else:
    raise UserError(f"router.name='{name}' is unknown{nearest(name, ROUTERS)}")
  return construct(cls, name, d, num_experts, rngs=rngs, **arguments)


def construct(cls: type, name: str, *given: Any, rngs: nnx.Rngs, **arguments: Any) -> Any:
  """`cls(*given, rngs=rngs, **arguments)`; a wrong argument is named as the config's."""
  signature = inspect.signature(cls.__init__)
  known = [n for n in list(signature.parameters)[1 + len(given):] if n != "rngs"]
  takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
  for argument, value in arguments.items():
    if argument not in known and not takes_any:
      raise UserError(f"router.{argument} is set, but router.name='{name}' takes no such argument"
                      + nearest(argument, known))
    wanted = signature.parameters[argument].annotation if argument in known else None
    kind = {int: numbers.Integral, float: numbers.Real, str: str}.get(wanted)
    if kind and not isinstance(value, kind):
      raise UserError(f"router.{argument}={value!r} is no {wanted.__name__}, which router.name='{name}' takes"
                      " there; give one")
  try:
    signature.bind(None, *given, rngs=rngs, **arguments)
  except TypeError as error:
    raise UserError(f"router.name='{name}': {error}; set it as router.KEY") from None
  return cls(*given, rngs=rngs, **arguments)


__all__ = ["CAUSALITY", "ROUTERS", "Router", "TopKRouter", "construct", "make_router", "router_metrics"]
