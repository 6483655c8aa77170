"""Routers and mixture layers by name, made with the arguments of a config, which are checked here."""

import functools
import importlib
import inspect
import math
import numbers
from typing import Any

from flax import nnx

from sparse_experts import config
from sparse_experts.config import code_names
from sparse_experts.config.key import INT32
from sparse_experts.errors import UserError, nearest
from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.experts import Experts
from sparse_experts.moe.mixtures.mixture import MixtureLayer
from sparse_experts.moe.routing import Router


def _load(where: str) -> Any:
  module, _, attribute = where.partition(":")
  return getattr(importlib.import_module(module), attribute)


def _table(package: str, where: dict[str, str]) -> dict[str, Any]:
  return {name: _load(f"sparse_experts.moe.{package}.{path}") for name, path in where.items()}


ROUTERS: dict[str, type[Router]] = _table("routers", config.ROUTERS)
LAYERS: dict[str, type[MixtureLayer]] = _table("mixtures", config.LAYERS)


# What an argument's annotation asks of its value; others are not looked at.
KINDS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real, str: str}
KINDS |= {of | None: (kind, type(None)) for of, kind in KINDS.items()}


def find_router(name: str) -> type[Router]:
  """The class of that name in ROUTERS, or at `package.module:Class`, which is derived from Router."""
  if ":" in name:
    code_names.check(name)
    try:
      found = _load(name)
    except Exception as error:  # whatever importing a user's module raises
      raise UserError(f"router.name='{name}' cannot be imported: {error or type(error).__name__}; give "
                      "package.module:Class") from error
    if not (isinstance(found, type) and issubclass(found, Router)):
      raise UserError(f"router.name='{name}' is {_what(found)}, not a class derived from "
                      "sparse_experts.moe.Router; give package.module:Class")
    return found
  check_known("router.name", name, ROUTERS)
  return ROUTERS[name]


def _what(found: Any) -> str:
  return f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"


def make_router(name: str, d: int, num_experts: int, *, rngs: nnx.Rngs, section: str = "model.router",
                **arguments: Any) -> Router:
  """The router of that name, or of `package.module:Class`; `arguments` are its constructor's.

  section: of the config, where the arguments were set; error messages name it.
  """
  return construct(find_router(name), name, d, num_experts, rngs=rngs, section=section, **arguments)


def router_k(name: str, **arguments: Any) -> int:
  """`k` of the router that these arguments make, its constructor's default if they do not set it."""
  if "k" in arguments:
    return arguments["k"]
  cls: Any = find_router(name)
  for base in cls.__mro__:
    known = inspect.signature(base.__init__).parameters
    if "k" in known:
      return known["k"].default
    if "of" in known:  # a router around another
      return router_k(arguments.get("of", known["of"].default))
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
      break
  return cls.k


def make_layer(name: str, d: int, experts: Experts, *, rngs: nnx.Rngs, section: str = "model.router",
               **arguments: Any) -> MixtureLayer:
  """The mixture layer of that name around `experts`; the rest is as for `make_router`."""
  return construct(LAYERS[name], name, d, experts, rngs=rngs, section=section, **arguments)


def construct(cls: Any, name: str, *positional: Any, rngs: nnx.Rngs, section: str, **arguments: Any) -> Any:
  """`cls(*positional, rngs=rngs, **arguments)`; a wrong argument is a UserError that names the config's key.

  A router that wraps another one takes `make_router` as an argument: it is passed here, so that no router
  imports this file.
  """
  signature = inspect.signature(cls.__init__)
  handed = {"rngs": rngs, "make_router": functools.partial(make_router, section=section)}
  handed = {n: value for n, value in handed.items() if n == "rngs" or n in signature.parameters}
  known = [n for n in list(signature.parameters)[1 + len(positional):] if n not in handed]
  own = list(signature.parameters.values())[1:]
  takes_any = any(p.kind is p.VAR_KEYWORD for p in own)
  takes = math.inf if any(p.kind is p.VAR_POSITIONAL for p in own) else sum(
      p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in own)
  if ("rngs" not in signature.parameters and not takes_any) or takes < len(positional):
    raise UserError(f"router.name='{name}': its __init__{signature} is not that of a router; write "
                    "def __init__(self, d, num_experts, *, rngs), and after them what the config may set")
  if wrong := [] if takes_any else [argument for argument in arguments if argument not in known]:
    unset = " ".join(f"--config.{section}.{argument}=none" for argument in wrong)
    keys = " and ".join(f"router.{argument}" for argument in wrong)
    if len(wrong) > 1:
      raise UserError(f"{keys} are set, but router.name='{name}' takes no such arguments; known: "
                      f"{', '.join(sorted(known))}; unset them with {unset}")
    raise UserError(f"{keys} is set, but router.name='{name}' takes no such argument"
                    f"{nearest(wrong[0], known)}; unset it with {unset}")
  for argument, value in arguments.items():
    wanted = signature.parameters[argument].annotation if argument in known else Any
    kind = getattr(wanted, "__name__", str(wanted)).removesuffix(" | None")
    check(isinstance(value, KINDS.get(wanted, object)), f"router.{argument}", repr(value),
          f"is no {kind}, which router.name='{name}' takes there; give one")
    number: Any = value if isinstance(value, numbers.Real) else 0
    check(abs(number) <= INT32, f"router.{argument}", value,
          f"is out of range; choose a number of at most {INT32:,}")
  try:
    signature.bind(None, *positional, **handed, **arguments)
  except TypeError as error:
    raise UserError(f"router.name='{name}': {error}; set it as router.KEY") from None
  return cls(*positional, **handed, **arguments)
