"""One update as a pure function of (state, batch, key)."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_experts import partitioning
from sparse_experts.config import ConfigDict
from sparse_experts.models import Batch, Model
from sparse_experts.tasks import task_of
from sparse_experts.tasks.sums import Pair, flat
from sparse_experts.training import objectives
from sparse_experts.training.selection import merge, select, trained, trained_buffers
from sparse_experts.training.state import TrainState, shardings

TrainStep = Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Pair]]]


def make_train_step(model: Model, optimizer: optax.GradientTransformation, config: ConfigDict) -> TrainStep:
  """f(state, batch, key) -> (state, metrics as flat pairs); `key` is the run's, folded with the step here.

  An update whose loss or gradient is not finite is skipped: only `step` increases, `skipped` is 1 and the
  other metrics are (0, 0). So a state never holds NaN, and the cause can be searched in it.
  No gradient is computed for parameters that `config.train.only` excludes; `grad_norm` is of the others.
  """
  accumulate = config.train.accumulate
  task, objective = task_of(config), make_objective(model, config)
  gradient = jax.grad(objective, has_aux=True)

  def accumulated(moving, frozen, buffers, batch, key):
    """The gradient of the whole batch, its micro-batches one after another.

    What the objective needs of the whole batch comes first, from a pass of which the compiler keeps only the
    masks, unless a loss is a function of a statistic of the whole batch. That pass draws the same noise.
    """
    parts = micro_batches(batch, accumulate)

    def sum_over_parts(of):
      keyed = lambda index, micro: of(micro, jax.random.fold_in(key, index))
      shapes = jax.eval_shape(keyed, 0, jax.tree.map(lambda x: x[0], parts))
      zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      add = lambda carry, item: (jax.tree.map(jnp.add, carry, keyed(*item)), None)
      return jax.lax.scan(add, zero, (jnp.arange(accumulate), parts))[0]

    over = sum_over_parts(lambda micro, key: objectives.whole(
        task.train_sums(model, merge(moving, frozen), buffers, micro, key)))
    return sum_over_parts(lambda micro, key: gradient(moving, frozen, buffers, micro, key, over))

  def train_step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Pair]]:
    key = jax.random.fold_in(key, state.step)
    mask = trained(config, state.params)
    moving, frozen = select(mask, state.params), select(jax.tree.map(operator.not_, mask), state.params)
    differentiate = accumulated if accumulate > 1 else gradient
    grads, (sums, aux) = differentiate(moving, frozen, state.buffers, batch, key)
    with jax.named_scope("optimizer"):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = merge(optax.apply_updates(moving, updates), frozen)
    buffers = model.next_buffers(params, state.buffers, sums["layers"])
    buffers = merge(select(trained_buffers(mask, buffers), buffers), state.buffers)
    new = state.replace(params=params, buffers=buffers, opt_state=opt_state)
    one, grad_norm = jnp.ones(()), optax.tree.norm(grads)
    finite = jnp.isfinite(sums["loss"][0] + aux + grad_norm)
    metrics = {"loss": sums["loss"], "aux_loss": (aux, one), "grad_norm": (grad_norm, one)}
    metrics |= flat(sums["layers"])
    metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)
    state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    metrics["skipped"] = (1 - finite.astype(jnp.float32), one)
    return state.replace(step=state.step + 1), metrics

  return train_step


def make_objective(model: Model, config: ConfigDict) -> Callable[..., tuple[Array, tuple[Any, Array]]]:
  """f(moving, frozen, buffers, batch, key, over=None) -> (what is minimised, (sums, its auxiliary part)).

  moving, frozen: parameters that are trained and the others. over: `objectives.whole` of the whole batch, if
  `batch` is a part of one.
  """
  task, weights = task_of(config), objectives.loss_weights(model)
  layer_losses = objectives.layer_losses(model, config)
  if "pooled" in layer_losses.values():
    objectives.check_pooled(model)

  def objective(moving, frozen, buffers, batch, key, over=None):
    sums = task.train_sums(model, merge(moving, frozen), buffers, batch, key)
    value, aux = objectives.total(sums, over or objectives.whole(sums), weights, layer_losses)
    return value, (sums, aux)

  return objective


def jit_train_step(model: Model, optimizer: optax.GradientTransformation, config: ConfigDict,
                   abstract: TrainState, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
  """The step as a run jits it: the state is donated and keeps its sharding, metrics are replicated."""
  return jax.jit(make_train_step(model, optimizer, config), donate_argnums=0,
                 out_shardings=(shardings(abstract), partitioning.replicated(mesh)))


def micro_batches(batch: Batch, accumulate: int) -> Batch:
  """[B, ...] -> [accumulate, B / accumulate, ...]: consecutive rows, so routing groups do not change.

  Each micro-batch is sharded over all devices again, which moves only token ids.
  """

  def split(x: Array) -> Array:
    x = x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:])
    return partitioning.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  return jax.tree.map(split, batch)
