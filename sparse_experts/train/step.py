"""One update as a pure function of (state, batch), and one evaluated batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from sparse_experts import partitioning
from sparse_experts.config import seeds
from sparse_experts.train import objectives
from sparse_experts.train.objectives import Pair
from sparse_experts.train.state import TrainState

Batch = dict[str, Array]


def make_train_step(
    model: Any, optimizer: optax.GradientTransformation, config: ConfigDict,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Pair]]]:
  """f(state, batch) -> (state, metrics as flat pairs); the noise is keyed by `seed.noise` and step."""
  weights = objectives.loss_weights(model)
  accumulate, seed, layer_losses = config.train.accumulate, seeds(config)["noise"], config.train.layer_losses

  def objective(params, buffers, batch, key, over):
    sums = objectives.train_sums(model, params, buffers, batch, key)
    value, aux = objectives.total(sums, over or objectives.counts(sums), weights, layer_losses)
    return value, (sums, aux)

  gradient = jax.grad(objective, has_aux=True)

  def accumulated(params, buffers, batch, key):
    """The gradient of the whole batch, its micro-batches one after another.

    The counts come first, from a pass over the whole batch of which the compiler keeps only the masks.
    """
    over = objectives.counts(objectives.train_sums(model, params, buffers, batch))

    def add(carry, item):
      index, micro = item
      part = gradient(params, buffers, micro, jax.random.fold_in(key, index), over)
      return jax.tree.map(jnp.add, carry, part), None

    parts = micro_batches(batch, accumulate)
    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, buffers, first, key, over))
    return jax.lax.scan(add, zero, (jnp.arange(accumulate), parts))[0]

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Pair]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    if accumulate > 1:
      grads, (sums, aux) = accumulated(state.params, state.buffers, batch, key)
    else:
      grads, (sums, aux) = gradient(state.params, state.buffers, batch, key, None)
    with jax.named_scope("optimizer"):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    layers = sums["layers"]
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        buffers=model.next_buffers(state.buffers, {name: s["metrics"] for name, s in layers.items()}),
        opt_state=opt_state)
    one = jnp.ones(())
    metrics = {"loss": sums["loss"], "aux_loss": (aux, one), "grad_norm": (optax.global_norm(grads), one)}
    return state, metrics | objectives.flat_layers(layers)

  return train_step


def micro_batches(batch: Batch, accumulate: int) -> Batch:
  """[B, ...] -> [accumulate, B / accumulate, ...]: consecutive rows, so routing groups stay what they are.

  Each micro-batch is spread over all devices again, which moves only token ids.
  """

  def split(x: Array) -> Array:
    x = x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:])
    return partitioning.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  return jax.tree.map(split, batch)


def make_eval_step(model: Any) -> Callable[[Any, Any, Batch], dict[str, Pair]]:
  """f(params, buffers, batch) -> flat pairs; sums over batches are exact measures of the whole."""

  def eval_step(params: Any, buffers: Any, batch: Batch) -> dict[str, Pair]:
    return objectives.eval_sums(model, params, buffers, batch)

  return eval_step
