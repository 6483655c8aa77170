"""AdamW and Adafactor from optax's parts, independent of stacking.

A stacked parameter [N, E, D, F] must be updated like N*E separate matrices: weight decay depends on the rank
of one matrix, and Adafactor's moments, clipping and parameter scale are those of one matrix. So optax's
per-leaf functions are vmapped over the axes named in `STACKED`.
"""

from collections.abc import Callable, Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_experts.config import ConfigDict
from sparse_experts.partitioning import is_axes
from sparse_experts.training.selection import select, trained

STACKED = ("layers", "expert")
NOT_DECAYED = ("buckets", "length")  # relative and learned positions: tables, not matrices


def _rsqrt_held(peak: float, warmup: int) -> optax.Schedule:
  """peak * sqrt(warmup / max(step, warmup)); a T5 learning rate of 1 is a peak of 1/sqrt(warmup)."""
  start = max(warmup, 1)
  return lambda step: peak * jnp.sqrt(start / jnp.maximum(step, start))


# f(peak, warm-up steps, steps after them): the schedule after the warm-up; cosine and linear end at 0.
SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    "cosine": lambda peak, _, left: optax.cosine_decay_schedule(peak, left),
    "linear": lambda peak, _, left: optax.linear_schedule(peak, 0.0, left),
    "rsqrt": lambda peak, warmup, _: lambda step: _rsqrt_held(peak, warmup)(step + warmup),
    "rsqrt_held": lambda peak, warmup, _: _rsqrt_held(peak, warmup),
    "constant": lambda peak, *_: optax.constant_schedule(peak)}
NO_WARM_UP = ("rsqrt_held",)  # T5's: the peak from the first step on
STEPS_BOUND = ("cosine", "linear")  # schedules whose values change with train.steps


def make_schedule(config: ConfigDict) -> optax.Schedule:
  """Learning rate of the update that follows `step` finished ones."""
  o = config.optimizer
  peak, warmup = o.learning_rate, o.warmup_steps
  after = SCHEDULES[o.schedule](peak, warmup, max(config.train.steps - warmup, 1))
  if not warmup or o.schedule in NO_WARM_UP:
    return after
  before = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))  # peak * (step + 1) / warmup
  return optax.join_schedules([before, after], [warmup])


def is_decayed(axes: tuple[str | None, ...]) -> bool:
  """Whether weight decay applies: one matrix has rank 2 or more and is not a table of biases."""
  return len([a for a in axes if a not in STACKED]) >= 2 and not set(axes) & set(NOT_DECAYED)


def split_path(path: tuple, params: Container[tuple]) -> tuple[tuple, tuple]:
  """Splits the path of an array of the state: (its parameter's path, or () if it has none; the rest)."""
  n = len(path)
  parts = [(path[i:j], path[:i] + path[j:]) for i in range(n) for j in range(i + 1, n + 1)]
  return max((part for part in parts if part[0] in params), key=lambda part: len(part[0]), default=((), path))


def _map_stacked(function: Callable, axes: tuple[str | None, ...], in_axes: Callable, out_axes: Callable):
  """vmaps over each stacked axis; `in_axes` and `out_axes` turn its index into vmap's arguments."""
  names, dims = list(axes), []
  while set(names) & set(STACKED):
    dims.append(next(i for i, name in enumerate(names) if name in STACKED))
    names.pop(dims[-1])
  for dim in reversed(dims):
    function = jax.vmap(function, in_axes=in_axes(dim), out_axes=out_axes(dim))
  return function


class PerMatrixState(NamedTuple):
  """A tree of states of one transformation: one per parameter, with its stacked axes in front."""

  inner: Any


def per_matrix(transform: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
  """Applies `transform` to every matrix of every parameter separately.

  `axes`: tree like the parameters, leaves tuples of logical names; axes named in `STACKED` are mapped.
  """

  def init(params):
    one = lambda a, p: _map_stacked(transform.init, a, lambda dim: (dim,), lambda dim: 0)(p)
    return PerMatrixState(jax.tree.map(one, axes, params, is_leaf=is_axes))

  def update(updates, state, params=None):
    one = lambda a, *args: _map_stacked(
        transform.update, a, lambda dim: (dim, 0, dim), lambda dim: (dim, 0))(*args)
    pairs = jax.tree.map(one, axes, updates, state.inner, params, is_leaf=is_axes)
    pick = lambda i: jax.tree.map(lambda _, pair: pair[i], axes, pairs, is_leaf=is_axes)
    return pick(0), PerMatrixState(pick(1))

  return optax.GradientTransformation(init, update)


def _adamw(o: ConfigDict, axes: Any, decayed: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
  return optax.adamw(schedule, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, mask=decayed)


def adafactor_core(min_dim_size_to_factor: int = 128) -> optax.GradientTransformation:
  """Factored RMS, update clipping at 1 and scaling by the parameter's RMS: Shazeer and Stern 2018.

  Decay 1 - t^-0.8 and no momentum, as T5 and Switch train.
  """
  factored = optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=min_dim_size_to_factor)
  return optax.chain(factored, optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def _adafactor(o: ConfigDict, axes: Any, decayed: Any,
               schedule: optax.Schedule) -> optax.GradientTransformation:
  """The learning rate is relative to each matrix's RMS; it scales the decay too, as in AdamW."""
  decay = optax.add_decayed_weights(o.weight_decay, mask=decayed)
  return optax.chain(per_matrix(adafactor_core(), axes), decay, optax.scale_by_learning_rate(schedule))


OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor}


def make_optimizer(config: ConfigDict, axes: Any) -> optax.GradientTransformation:
  """`axes`: tree like the parameters, leaves tuples of logical axis names.

  Parameters that `config.train.only` excludes are None in updates and in the state; gradients may have them.
  """
  o, schedule = config.optimizer, make_schedule(config)

  def of(mask: Any) -> optax.GradientTransformation:
    moving = select(mask, axes)
    core = OPTIMIZERS[o.name](o, moving, jax.tree.map(is_decayed, moving, is_leaf=is_axes), schedule)
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), core) if o.clip_norm else core

  def init(params):
    mask = trained(config, params)
    return of(mask).init(select(mask, params))

  def update(grads, state, params):
    mask = trained(config, params)
    return of(mask).update(select(mask, grads), state, select(mask, params))

  return optax.GradientTransformation(init, update)


def state_axes(opt_state: Any, params: Any, axes: Any) -> Any:
  """Logical axes of each array of the optimizer's state, from those of the parameter it belongs to.

  A moment has its parameter's axes; a factored one lost some and has its stacked ones in front;
  counters have none.
  """
  flat_axes = dict(jax.tree.flatten_with_path(axes, is_leaf=is_axes)[0])
  by_path = {path: (flat_axes[path], p.shape) for path, p in jax.tree.flatten_with_path(params)[0]}

  def of_leaf(path: tuple, leaf: jax.Array) -> tuple[str | None, ...]:
    param, _ = split_path(path, by_path)
    return _kept_axes(leaf.shape, *by_path[param]) if param else (None,) * len(leaf.shape)

  return jax.tree.map_with_path(of_leaf, opt_state)


def _kept_axes(shape: tuple[int, ...], axes: tuple, param_shape: tuple[int, ...]) -> tuple[str | None, ...]:
  """Names for `shape`, which is `param_shape` with stacked axes moved to the front and others reduced.

  If two sizes are equal, either name will do: a sharding of the moments changes no result.
  """
  if shape == param_shape:
    return axes
  order = sorted(range(len(axes)), key=lambda i: axes[i] not in STACKED)
  names, start = [], 0
  for size in shape:
    at = next((n for n in range(start, len(order)) if param_shape[order[n]] == size), None)
    names.append(None if at is None else axes[order[at]])
    start = start if at is None else at + 1
  return tuple(names)
