"""What routers share, against plain NumPy and JAX's own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.moe.routing import Routing, by_token, count_experts, lists, scores
from sparse_experts.moe.routing.assignments import sort_stable


@pytest.mark.parametrize("E, k", [(1, 1), (3, 3), (8, 2), (13, 5), (64, 8)])
def test_top_k_is_numpys_stable_sort(E, k):
  score = np.random.default_rng(E).integers(-3, 3, (2, 40, E)).astype(np.float32)  # many ties
  score[0, 0, :E - k] = -np.inf
  expert, value = jax.jit(scores.top_k, static_argnums=1)(score, k)
  wanted = np.argsort(-score, axis=-1, kind="stable")[..., :k]
  np.testing.assert_array_equal(expert, wanted)
  np.testing.assert_array_equal(value, np.take_along_axis(score, wanted, -1))


def test_gradients_are_jaxs_own():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  x_GTD, w_DE, d_GTK = draw(2, 6, 4), draw(4, 8), draw(2, 6, 3)

  def ours(x_GTD, w_DE):
    return (scores.top_k(scores.softmax(scores.linear(x_GTD, w_DE)), 3)[1] * d_GTK).sum()

  def plain(x_GTD, w_DE):
    return (jax.lax.top_k(jax.nn.softmax(x_GTD @ w_DE), 3)[0] * d_GTK).sum()

  for found, wanted in zip(*(jax.jit(jax.grad(f, argnums=(0, 1)))(x_GTD, w_DE) for f in (ours, plain))):
    np.testing.assert_allclose(found, wanted, atol=2e-6)  # sums of 12 products of order 1 in float32


@pytest.mark.parametrize("num_keys", [5, 2**31 - 1])  # packed into one number, and too large for it
def test_order_keeps_equal_keys_as_they_come(num_keys):
  key = np.random.default_rng(1).integers(0, 5, (3, 50))
  wanted = np.argsort(key, axis=-1, kind="stable")
  np.testing.assert_array_equal(sort_stable(jnp.asarray(key), num_keys), wanted)


def test_what_belongs_to_a_token_and_counts_of_experts():
  token = jnp.array([[1, 0, 0, 1, 2, 2]])
  to_tokens = by_token(Routing(token=token), 2)
  np.testing.assert_array_equal(to_tokens(jnp.arange(6)[None] * 10), [[[10, 20], [0, 30], [40, 50]]])
  expert, valid = jnp.array([[2, 2, 0, 1], [3, 3, 3, 3]]), jnp.array([[1, 1, 0, 1], [1, 0, 1, 1]], bool)
  np.testing.assert_array_equal(count_experts(expert, valid, 4), [[0, 1, 2, 0], [0, 0, 0, 3]])


@pytest.mark.parametrize("order", lists.ORDERS)
def test_a_known_order_is_undone_without_a_sort(order):
  """As the sort would find it; another list of tokens is in no known order."""
  rng = np.random.default_rng(0)
  expert_GTK, prob_GTE = rng.integers(0, 4, (2, 5, 3)).astype(np.int32), rng.random((2, 5, 4), np.float32)
  routing = lists.token_choice(jnp.asarray(expert_GTK), jnp.ones((2, 5, 3)), jnp.asarray(prob_GTE),
                               jnp.ones((2, 5), bool), order=order)
  assert routing.order == order
  undo = lambda routing: by_token(routing, 3)(routing.expert)
  moved = routing.replace(token=routing.token)
  assert moved.order is None
  for found in (undo(routing), undo(moved)):
    np.testing.assert_array_equal(found, expert_GTK)
  sorts = [jax.jit(undo).lower(of).as_text().count("stablehlo.sort") for of in (routing, moved)]
  assert sorts == [0, 1]
