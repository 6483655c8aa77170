"""Blocks against the library's ragged product and a loop, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.moe.grouped_matmul import _blocked, grouped_matmul, reference

SIZES = {
    "even": [8, 8, 8, 8], "uneven": [0, 21, 1, 10], "one": [32, 0, 0, 0], "last": [0, 0, 0, 32],
    "tail": [5, 0, 9, 3], "nothing": [0, 0, 0, 0]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("block", [4, 8, 128, None])
def test_equals_a_loop(block, sizes):
  """None: the reference, which is what other platforms run."""
  R, D, F, E = 32, 6, 5, 4
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, dy = (jax.random.normal(k, s) for k, s in zip(keys, [(R, D), (E, D, F), (R, F)], strict=True))
  size_E = jnp.array(sizes)
  function = functools.partial(_blocked, block) if block else reference
  y, pullback = jax.vjp(lambda x, w: function(x, w, size_E), x, w)
  dx, dw = pullback(dy)

  expected, dx_loop, dw_loop = np.zeros((R, F)), np.zeros((R, D)), np.zeros((E, D, F))
  for r, e in enumerate(np.repeat(np.arange(E), sizes)):
    expected[r], dx_loop[r] = x[r] @ w[e], w[e] @ dy[r]
    dw_loop[e] += np.outer(x[r], dy[r])
  for got, want in ((y, expected), (dx, dx_loop), (dw, dw_loop)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # float32 sums of up to 32 products


def test_bfloat16_weight_gradient_is_summed_in_float32():
  """300 rows of ones: a bfloat16 running sum would stop at 256."""
  x, w = jnp.ones((300, 4), jnp.bfloat16), jnp.ones((1, 4, 4), jnp.bfloat16)
  dw = jax.grad(lambda w: grouped_matmul(x, w, jnp.array([300])).astype(jnp.float32).sum())(w)
  np.testing.assert_array_equal(dw.astype(jnp.float32), 300)
