"""Router products on a TPU: float32 scores by as few bfloat16 passes as the activations need."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.moe import Tokens, TopKRouter
from sparse_experts.moe.routing import scores

G, T, D, E = 2, 8, 32, 6


def operands():
  keys = jax.random.split(jax.random.key(0), 3)
  x_GTD = jax.random.normal(keys[0], (G, T, D), jnp.bfloat16)
  return x_GTD, jax.random.normal(keys[1], (D, E)), jax.random.normal(keys[2], (G, T, E))


def both_ways(x_GTD, w_DE, d_GTE):
  score_GTE, pull = jax.vjp(scores.linear, x_GTD, w_DE)
  return score_GTE, *pull(d_GTE)


def test_parts_of_float32_weights_lose_nothing(monkeypatch):
  """Scores and the weights' gradient as in float64 to float32's rounding; two parts are 1e-5 off."""
  monkeypatch.setattr(partitioning, "platform", lambda: "tpu")
  x, w, d = operands()
  score, dx, dw = jax.jit(lambda *operands: both_ways(*operands))(x, w, d)
  x, w, d = (np.asarray(a, np.float64) for a in (x, w, d))
  np.testing.assert_allclose(score, x @ w, atol=4e-6)  # sums of 32 products of order 1
  np.testing.assert_allclose(dw, np.einsum("gtd,gte->de", x, d), atol=4e-6)
  assert dx.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(dx, np.float64), d @ w.T, rtol=2**-8, atol=1e-5)  # bfloat16


def passes(text):
  """bfloat16 passes over the scores' width that a TPU makes for a lowered program's products."""
  of = {"DEFAULT": 3, "HIGH": 3, "HIGHEST": 6}  # by default, one pass over three parts side by side
  products = re.findall(r"stablehlo\.dot_general .*precision = \[(\w+), \w+\].*\((.*?)\) ->", text)
  assert all((precision == "DEFAULT") == ("x18xbf16" in operands) for precision, operands in products)
  return sum(of[precision] for precision, _ in products)


@pytest.mark.parametrize("platform, dtype, wanted", [
    ("tpu", jnp.bfloat16, 9), ("tpu", jnp.float32, 18), ("cpu", jnp.bfloat16, 18)])
def test_passes(monkeypatch, platform, dtype, wanted):
  """Of three products, the score and two gradients."""
  monkeypatch.setattr(partitioning, "platform", lambda: platform)
  x, w, d = operands()
  program = jax.jit(lambda *operands: both_ways(*operands))  # not one that was traced for another platform
  assert passes(program.lower(x.astype(dtype), w, d).as_text()) == wanted


@pytest.mark.parametrize("jitter, wanted", [(0.0, 3), (0.1, 6)])
def test_a_router_scores_what_it_is_given(monkeypatch, jitter, wanted):
  """Tokens stay bfloat16 up to the product, unless noise makes float32 of them."""
  monkeypatch.setattr(partitioning, "platform", lambda: "tpu")
  router, tokens = TopKRouter(D, E, jitter=jitter, rngs=nnx.Rngs(0)), Tokens(mask=jnp.ones((G, T), bool))
  text = jax.jit(lambda x: router(x, tokens, None, jax.random.key(1)).gate).lower(operands()[0]).as_text()
  assert passes(text) == wanted
