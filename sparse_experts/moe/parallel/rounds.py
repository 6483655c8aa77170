"""A sum over as many rounds as a batch needs, usually one, that holds the memory of one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# (k, x_RD, weights, fixed) -> y_RD of round k; static: every array it needs is an argument.
Round = Callable[[Array | int, Array, Any, Any], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_rounds(one_round: Round, rounds: Array, x_RD: Array, weights: Any, fixed: Any) -> Array:
  """y_RD: Σ over k < max(rounds, 1) of `one_round`; `fixed` has no gradient.

  Round 0 keeps for the backward pass what it would keep alone. A later round is made again there, so nothing
  is kept of it, and its gradients are added to the sums in place: a batch of one round turns no loop and adds
  nothing. `rounds` is equal on all devices that meet in a round.
  """
  return _forward(one_round, rounds, x_RD, weights, fixed)[0]


def _forward(one_round: Round, rounds: Array, x_RD: Array, weights: Any,
             fixed: Any) -> tuple[Array, tuple[Any, ...]]:
  y_RD, pull = jax.vjp(lambda x_RD, weights: one_round(0, x_RD, weights, fixed), x_RD, weights)
  add = lambda k, y_RD: y_RD + one_round(k, x_RD, weights, fixed)
  return jax.lax.fori_loop(1, rounds, add, y_RD), (pull, rounds, x_RD, weights, fixed)


def _backward(one_round: Round, residuals: tuple[Any, ...], dy_RD: Array) -> tuple[Any, ...]:
  pull, rounds, x_RD, weights, fixed = residuals

  def add(k, sums):
    _, pull = jax.vjp(lambda x_RD, weights: one_round(k, x_RD, weights, fixed), x_RD, weights)
    return jax.tree.map(jnp.add, sums, pull(dy_RD))

  dx_RD, dw = jax.lax.fori_loop(1, rounds, add, pull(dy_RD))
  return None, dx_RD, dw, None


sum_rounds.defvjp(_forward, _backward)
