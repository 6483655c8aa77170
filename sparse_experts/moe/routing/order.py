"""The order of a list in which tokens choose: how it is made, and where a token's assignments stand in it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.routing.assignments import Routing, sort_stable


def order_assignments(order: str, expert_GTK: Array, gate_GTK: Array, valid_GTK: Array,
                      score_GT: Array | None = None) -> tuple[Array, ...]:
  """The list (token, expert, gate, valid), each _GA, in the order in which assignments claim slots.

  `score_GT`, which falls along the list, is for `batch_priority` only.
  """
  G, T, K = expert_GTK.shape
  token_GTK = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (G, T, K))
  arrays: tuple[Array, ...] = (token_GTK, expert_GTK, gate_GTK, valid_GTK)
  if order == "token":
    return tuple(a.reshape(G, T * K) for a in arrays)
  if score_GT is not None:
    by_score_GT = jnp.argsort(-score_GT, axis=-1, stable=True)
    arrays = tuple(jnp.take_along_axis(a, by_score_GT[..., None], axis=1) for a in arrays)
  return tuple(a.swapaxes(1, 2).reshape(G, K * T) for a in arrays)


def by_token(routing: Routing, k: int) -> Callable[[Array], Array]:
  """A function a_GA -> a_GTK that gathers the values of each token's k assignments, in list order.

  Where the list's order is known it is undone; else the list is sorted by token.
  """
  G, A = routing.token.shape
  T = A // k
  if routing.order == "token":
    return lambda a_GA: a_GA.reshape(G, T, k)
  by_choice = lambda a_GA: a_GA.reshape(G, k, T).swapaxes(1, 2)
  if routing.order == "choice":
    return by_choice
  if routing.order == "batch_priority":  # each choice lists the tokens in the same order
    index_T = jnp.arange(T, dtype=jnp.int32)
    unsort = jax.vmap(lambda token_T: jnp.zeros(T, jnp.int32).at[token_T].set(index_T))
    at_GT1 = unsort(routing.token[:, :T])[..., None]
    return lambda a_GA: jnp.take_along_axis(by_choice(a_GA), at_GT1, axis=1)
  mine_GA = sort_stable(routing.token, T)
  return lambda a_GA: jnp.take_along_axis(a_GA, mine_GA, axis=-1).reshape(G, T, k)
