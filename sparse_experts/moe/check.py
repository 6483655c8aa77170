"""Checks of a router's contract; an error is one line that names the router's class.

`check_list` checks shapes and types, while a layer is traced. `check_router` runs a router on a small batch
and checks values, gradients, and what the routing of a token depends on. Nothing here is particular to token
choice: any list that the dispatches can move passes.
"""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.interpreters import partial_eval

from sparse_experts.errors import UserError, call, nearest
from sparse_experts.moe.routing import CAUSALITY, Router, Routing, Tokens, as_pair, by_token

LIST = {"token": jnp.int32, "expert": jnp.int32, "gate": jnp.float32, "valid": jnp.bool_}
_GROUPS = 4  # no padding, some padding, all padding, and one that stays the same when others change
_TOLERANCE = 1e-5  # sums over a changed group, or of a call that is differentiated, may have another order


def check_list(router: Router, routing: Any, shape_GT: tuple[int, ...]) -> None:
  """Raises UserError unless shapes, types, losses and metrics are as `Routing` defines them."""
  require = functools.partial(_require, router)
  require(isinstance(routing, Routing), f"it returned {type(routing).__name__}", "return a Routing")
  G, T = shape_GT
  for name, dtype in LIST.items():
    array = getattr(routing, name)
    require(hasattr(array, "shape"), f"{name} is {type(array).__name__}", "give an array [G, A]")
    require(len(array.shape) == 2 and array.shape[0] == G,
            f"{name} has shape {array.shape}, but there are {G} groups", "give [G, A]")
    require(array.shape == routing.token.shape,
            f"{name} has shape {array.shape}, but token has {routing.token.shape}",
            "token, expert, gate and valid list the same assignments")
    require(array.dtype == dtype, f"{name} is {array.dtype}", f"give {np.dtype(dtype).name}")
  A, K = routing.token.shape[1], routing.rows_per_token
  if K is not None:
    require(A == T * K, f"rows_per_token={K} promises {T} x {K} = {T * K} assignments per group, there are "
            f"{A}", "leave it None if tokens appear a varying number of times")
  for kind, name, pair in _pairs(routing):
    require(isinstance(pair, tuple) and len(pair) == 2 and all(hasattr(x, "shape") for x in pair),
            f"{kind}['{name}'] is no pair of arrays", "give (sum, count)")
    want = (router.num_experts,) if (kind, name) == ("metrics", "load") else ()
    require(pair[0].shape == want and pair[1].shape == (),
            f"{kind}['{name}'] has shapes {pair[0].shape} and {pair[1].shape}",
            f"give a sum of shape {want} over all groups and a count of shape ()")
  for name in ("log_prob", "value"):
    if (array := getattr(routing, name)) is not None:
      require(array.shape == (G, T), f"{name} has shape {array.shape}, there are {G} groups of {T} tokens",
              "give [G, T]")
    require(array is not None or not router.reward_weights,
            "it has reward_weights, but its routing lacks log_prob or value", "return both")
  require("load" in routing.metrics, "metrics lack 'load', the assignments of each expert",
          "take metrics from router_metrics(...), or add (load_E, number of tokens)")
  for name in router.loss_weights:
    require(name in routing.losses, f"loss_weights has '{name}', but losses do not"
            f"{nearest(name, routing.losses)}", "return that loss, or drop its weight")


def draws(router: Router, d: int) -> bool:
  """Whether the routing of tokens of width d depends on the key that it is given while training.

  By the program that is traced: whether anything of the result needs the key.
  """
  graphdef, state = nnx.split(router)
  T = router.num_experts * -(-16 // router.num_experts)
  id_GT = jnp.arange(T, dtype=jnp.int32)[None]
  tokens = Tokens(mask=id_GT >= 0, id=id_GT, sequence=id_GT // 8, task=id_GT % router.num_experts)

  def assigned(state, x_GTD, key):
    routing = nnx.merge(graphdef, state)(x_GTD, tokens, None, key)
    return routing.token, routing.expert, routing.gate, routing.valid

  program = jax.make_jaxpr(assigned)(
      state, jax.ShapeDtypeStruct((1, T, d), jnp.float32), jax.eval_shape(lambda: jax.random.key(0)))
  return partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))[1][-1]


def check_router(router: Router, d: int) -> None:
  """Raises UserError, one line with the router's class, if it breaks the contract of a `Router`.

  d: width of the tokens' vectors. It compiles the router twice, for 4 groups of at least 16 tokens.
  """
  _check_fields(router)
  E = router.num_experts
  T = E * -(-16 // E)
  rng = np.random.default_rng(0)
  mask_GT = np.ones((_GROUPS, T), bool)
  mask_GT[1, T // 3] = mask_GT[1, -T // 4:] = mask_GT[2] = False
  half_GT = np.broadcast_to(np.arange(T) >= T // 2, (_GROUPS, T))
  draw_x = lambda: rng.normal(size=(_GROUPS, T, d)).astype(np.float32) * mask_GT[..., None]
  draw_id = lambda: rng.integers(3, 250, (_GROUPS, T), dtype=np.int32)
  x_GTD, id_GT = draw_x(), draw_id()  # padding is zero, as from the layer
  sequence_GT = (np.arange(_GROUPS)[:, None] * 2 + half_GT).astype(np.int32)
  given: dict[str, Any] = dict(mask=mask_GT, sequence=sequence_GT, task=(sequence_GT % 3).astype(np.int32))
  graphdef, *states = nnx.split(router, nnx.Param, ...)
  params, rest = states

  def called(*arguments):
    try:
      return nnx.merge(graphdef, *arguments[:2])(*arguments[2:])
    except flax.errors.TraceContextError:
      _refuse(router, "it changes a variable while routing",
              "change state in next_state, and draw from `key` instead of a stored nnx.Rngs")

  code = getattr(type(router).__call__, "__code__", None)
  what = f"router {type(router).__name__}, on vectors of width {d},"

  signature = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype.name), tree)

  def route(params, rest, *arguments):
    routing = call(code.co_filename if code else what, what, lambda: called(params, rest, *arguments))
    check_list(router, routing, mask_GT.shape)
    old, weights = nnx.to_pure_dict(rest), nnx.to_pure_dict(params)
    new = jax.eval_shape(router.next_state, old, weights, routing.metrics, routing.stats)
    _require(router, signature(new) == signature(old),
             f"next_state turns {signature(old)} into {signature(new)}", "keep names, shapes and types")
    return routing

  def objective(params, x_GTD, rest, tokens):
    routing = route(params, rest, x_GTD, tokens, None, None)
    losses = [as_pair(routing.losses[name])[0] for name in router.loss_weights]
    slope_GA = jnp.cos(jnp.arange(routing.gate.size, dtype=jnp.float32)).reshape(routing.gate.shape)
    again = route(params, rest, x_GTD, tokens, None, None)
    return jnp.where(routing.valid, routing.gate * slope_GA, 0.0).sum() + sum(losses), (routing, again)

  quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  gradient = jax.jit(jax.grad(objective, (0, 1), has_aux=True), compiler_options=quick)
  look = lambda x_GTD, id_GT: jax.device_get(gradient(params, x_GTD, rest, Tokens(id=id_GT, **given)))
  grads, (plain, again) = look(x_GTD, id_GT)
  _check_values(router, plain, mask_GT)
  alike = lambda a, b: np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
  _require(router, all(map(alike, jax.tree.leaves(plain), jax.tree.leaves(again))),
           "two calls on the same tokens without a key differ", "draw from `key` only")
  for what, grad in zip(("parameters", "input"), grads, strict=True):
    _require(router, all(np.isfinite(g).all() for g in jax.tree.leaves(grad)),
             f"gradients of gates or losses in its {what} are not finite",
             "avoid divisions, logs and roots of zero, also behind `where`")

  # What else does a token's routing depend on? One half of its group gets other vectors and ids.
  for changed_GT in (half_GT, ~half_GT):
    changed_GT = changed_GT & (np.arange(_GROUPS) < _GROUPS - 1)[:, None]
    other_x = np.where(changed_GT[..., None], 3 * draw_x(), x_GTD)
    _, (other, _) = look(other_x, np.where(changed_GT, draw_id(), id_GT))
    differs_GT = np.abs(_dense(plain, E, T) - _dense(other, E, T)).max(-1) > _TOLERANCE
    _check_causality(router, differs_GT & ~changed_GT, sees_later=changed_GT[0, -1])

  noisy = jax.jit(route, static_argnums=4, compiler_options=quick)(
      params, rest, x_GTD, Tokens(id=jnp.asarray(id_GT), **given), max(2 * router.k * T // E, 1),
      jax.random.key(0))
  _check_values(router, jax.device_get(noisy), mask_GT)


def _refuse(router: Router, what: str, way_out: str) -> None:
  raise UserError(f"router {type(router).__name__}: {what}; {way_out}")


def _require(router: Router, holds: bool, what: str, way_out: str) -> None:
  if not holds:
    _refuse(router, what, way_out)


def _pairs(routing: Routing) -> list[tuple[str, str, Any]]:
  """(kind, name, pair) of all losses and metrics."""
  kinds: dict[str, dict[str, Any]] = {"losses": routing.losses, "metrics": routing.metrics}
  return [(kind, name, as_pair(pair)) for kind, pairs in kinds.items() for name, pair in pairs.items()]


def _check_fields(router: Router) -> None:
  if isinstance(router, type):
    raise UserError(f"router {router.__name__} is a class; give an instance, such as {router.__name__}(d, "
                    "num_experts, rngs=nnx.Rngs(0))")
  if not isinstance(router, Router):
    raise UserError(f"router {router!s:.60} is no Router; give an instance of a subclass of "
                    "sparse_experts.moe.Router")
  for name in ("num_experts", "k"):
    value = getattr(router, name, None)
    _require(router, isinstance(value, int) and value >= 1, f"{name} is {value!r}",
             f"set self.{name} to a whole number in __init__")
  for name in ("causality", "drop_causality"):
    value = getattr(router, name)
    _require(router, value in CAUSALITY, f"{name}='{value}' is unknown{nearest(str(value), CAUSALITY)}",
             "see moe/routing/router.py")


def _check_values(router: Router, r: Routing, mask_GT: np.ndarray) -> None:
  (G, T), E, K = mask_GT.shape, router.num_experts, r.rows_per_token
  group_GA = np.broadcast_to(np.arange(G)[:, None], r.token.shape)

  def refuse_where(bad, values, what, way_out):
    if bad.any():
      _refuse(router, what.format(values[bad][0]), way_out)

  refuse_where((r.token < 0) | (r.token >= T), r.token, f"token {{}} is listed in a group of {T}",
               f"tokens are 0 to {T - 1}")
  refuse_where(r.valid & ((r.expert < 0) | (r.expert >= E)), r.expert, f"expert {{}} is listed, of {E}",
               f"experts are 0 to {E - 1}")
  refuse_where(r.valid & ~np.isfinite(r.gate), r.gate, "a gate is {}", "gates are finite numbers")
  refuse_where(r.valid & ~mask_GT[group_GA, r.token], r.token, "token {} is padding and listed as valid",
               "set valid to False where tokens.mask is")
  pairs = np.stack([group_GA, r.token, r.expert], -1)[r.valid]
  distinct, count = np.unique(pairs, axis=0, return_counts=True)
  refuse_where(count > 1, distinct, "token {0[1]} is sent to expert {0[2]} twice",
               "list a pair once, with the sum of its gates")
  if K is not None:
    times_GT = (r.token[..., None] == np.arange(T)).sum(1)
    refuse_where(times_GT != K, times_GT, f"rows_per_token={K}, but a token is listed {{}} times",
                 "leave it None if tokens appear a varying number of times")
    found_GTK = np.asarray(by_token(r, K)(r.token))
    refuse_where(found_GTK != np.arange(T)[:, None], found_GTK,
                 f"order='{r.order}', but token {{}} stands in another's place", "leave it None")
  for kind, name, pair in _pairs(r):
    _require(router, all(np.isfinite(x).all() for x in pair), f"{kind}['{name}'] is not finite",
             "handle groups that are all padding")


def _dense(r: Routing, E: int, T: int) -> np.ndarray:
  """The list without its order: gate_GTE + 1 where a token goes to an expert, 0 elsewhere."""
  dense_GTE = np.zeros((r.token.shape[0], T, E))
  g, a = np.nonzero(r.valid)
  np.add.at(dense_GTE, (g, r.token[g, a], r.expert[g, a]), 1.0 + r.gate[g, a])
  return dense_GTE


def _check_causality(router: Router, differs_GT: np.ndarray, sees_later: bool) -> None:
  _require(router, not differs_GT[-1].any(), "the routing of a group depends on other groups",
           "route each group by itself")
  allowed = {"self": False, "past": not sees_later, "sequence": False, "batch": True}[router.causality]
  if differs_GT.any() and not allowed:
    others = {"self": "other tokens", "past": "later tokens", "sequence": "other sequences"}[router.causality]
    _refuse(router, f"causality='{router.causality}', but a token's routing depends on {others} of its group",
            "declare what it depends on: " + ", ".join(CAUSALITY[CAUSALITY.index(router.causality) + 1:]))
