"""One run: a model trained on the full batch from a seed until its stop rule, and its test accuracy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from experiments.understanding_moe import models
from experiments.understanding_moe.data import Examples

MIXTURE_STEPS, SINGLE_STEPS = 501, 801
EXPERT_RATE, ROUTER_RATE = 1e-3, 0.1
SINGLE_RATE = {"linear": 3e-3, "cubic": 1e-2}
WEIGHT_DECAY = 5e-4  # Adam's of PyTorch: added to the gradient
PART = 1000  # examples whose gradients are computed at once; it divides their number


class Outcome(NamedTuple):
  steps: Array  # taken, the last one included
  loss: Array  # of the last step, before its update
  accuracy: Array  # on the test examples, with the router's noise if there is a router
  accuracy_no_noise: Array
  expert_N: Array | None  # where the last training step sent its examples


def cross_entropy(logit_NC: Array, label_N: Array) -> Array:
  return optax.softmax_cross_entropy_with_integer_labels(logit_NC, label_N).mean()


def double_softmax_loss(class_NC: Array, label_N: Array) -> Array:
  """Cross-entropy that takes probabilities for logits, as the notebooks do; at least log(1 + 1/e), 0.3133."""
  return cross_entropy(jax.nn.softmax(class_NC), label_N)


def mixture_stops(step: Array, loss: Array, best: Array) -> Array:
  """Whether a run ends with step number `step` (0 the first); `best` is the least loss before it."""
  del step
  return (loss >= best) & ((loss > best + 0.02) | (loss <= 0.314))


def single_stops(step: Array, loss: Array, best: Array) -> Array:
  return (step > 500) & (loss > best + 0.02)


def normalized(grads: dict[str, Array]) -> dict[str, Array]:
  """Each expert's gradients over (norm of its weights' + norm of its biases'); 0 where they are 0."""
  norm_E = sum(jnp.sqrt((g * g).sum(tuple(range(1, g.ndim)))) for g in grads.values())
  norm_E = jnp.where(norm_E > 0, norm_E, 1.0)
  return {name: g / norm_E.reshape(-1, *(1,) * (g.ndim - 1)) for name, g in grads.items()}


def descend_mixture(params, grads):
  """Normalised descent for the experts, plain descent for the router, from one backward pass."""
  step = lambda rate, params, grads: jax.tree.map(lambda p, g: p - rate * g, params, grads)
  return {
      "experts": step(EXPERT_RATE, params["experts"], normalized(grads["experts"])),
      "router": step(ROUTER_RATE, params["router"], grads["router"]),
  }


def in_parts(objective):
  """(params, examples, key) -> (loss, grads, aux of each part) of the full batch, part after part.

  objective: (params, part, key) -> (mean loss of the part, aux). What a part needs stays in the cache: a
  step of 16,000 examples takes less than half the time.
  """

  def whole(params, examples: Examples, key: Array):
    def add(total, part):
      (loss, aux), grads = jax.value_and_grad(objective, has_aux=True)(params, *part)
      return jax.tree.map(jnp.add, total, (loss, grads)), aux

    parts = split(examples)
    n = parts.label_N.shape[0]
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    total, aux = jax.lax.scan(add, zero, (parts, jax.random.split(key, n)))
    loss, grads = jax.tree.map(lambda a: a / n, total)
    return loss, grads, aux

  return whole


def split(examples: Examples) -> Examples:
  """Parts of PART examples along a new first axis."""
  return jax.tree.map(lambda a: a.reshape(-1, PART, *a.shape[1:]), examples)


def accuracy(classify, examples: Examples, key: Array | None) -> Array:
  """Share of examples whose class scores highest; classify: (x_ND, key) -> class_NC."""
  parts = split(examples)

  def right(part):
    i, part = part
    class_NC = classify(part.x_ND, None if key is None else jax.random.fold_in(key, i))
    return (class_NC.argmax(-1) == part.label_N).mean()

  return jax.lax.map(right, (jnp.arange(parts.label_N.shape[0]), parts)).mean()


def descend(full_batch, update, state, aux, stops, steps: int):
  """(state, steps taken, last loss, last aux); full_batch: (state, step) -> (loss, grads, aux).

  The sheet does not say whether the step that ends a run still updates; here it does.
  """

  def step(carry):
    i, state, best, _, _, _ = carry
    loss, grads, aux = full_batch(state, i)
    return i + 1, update(state, grads), jnp.minimum(best, loss), loss, aux, stops(i, loss, best)

  go_on = lambda carry: (carry[0] < steps) & ~carry[-1]
  first = (jnp.int32(0), state, jnp.float32(jnp.inf), jnp.float32(jnp.inf), aux, jnp.bool_(False))
  taken, state, _, loss, aux, _ = jax.lax.while_loop(go_on, step, first)
  return state, taken, loss, aux


@functools.partial(jax.jit, static_argnames=("activation", "gate"))
def run_mixture(key: Array, train: Examples, test: Examples, *, activation: str, gate: str) -> Outcome:
  init_key, noise_key, test_key = jax.random.split(key, 3)
  graphdef, params = nnx.split(models.mixture(activation, gate, rngs=nnx.Rngs(init_key)))

  def objective(params, part, key):
    class_NC, routing = nnx.merge(graphdef, params)(part.x_ND, key)
    return double_softmax_loss(class_NC, part.label_N), routing.expert[0]

  full_batch = in_parts(objective)
  params, steps, loss, expert_N = descend(
      lambda params, step: full_batch(params, train, jax.random.fold_in(noise_key, step)),
      descend_mixture, nnx.to_pure_dict(params), jnp.zeros((train.label_N.size // PART, PART), jnp.int32),
      mixture_stops, MIXTURE_STEPS)
  classify = lambda x_ND, key: nnx.merge(graphdef, params)(x_ND, key)[0]
  return Outcome(steps, loss, accuracy(classify, test, test_key), accuracy(classify, test, None),
                 expert_N.reshape(-1))


@functools.partial(jax.jit, static_argnames="activation")
def run_single(key: Array, train: Examples, test: Examples, *, activation: str) -> Outcome:
  graphdef, params = nnx.split(models.single(activation, rngs=nnx.Rngs(key)))
  optimizer = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.adam(SINGLE_RATE[activation]))
  classify = lambda params, x_ND: nnx.merge(graphdef, params)(x_ND)

  def objective(params, part, key):
    del key
    return cross_entropy(classify(params, part.x_ND), part.label_N), None

  def update(state, grads):
    params, moments = state
    updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments

  full_batch, params = in_parts(objective), nnx.to_pure_dict(params)
  (params, _), steps, loss, _ = descend(
      lambda state, step: full_batch(state[0], train, key), update, (params, optimizer.init(params)), None,
      single_stops, SINGLE_STEPS)
  right = accuracy(lambda x_ND, key: classify(params, x_ND), test, None)
  return Outcome(steps, loss, right, right, None)
