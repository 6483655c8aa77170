"""Every backend against a loop, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe.grouped.layout import BACKENDS, reserved_and_block
from sparse_experts.moe.grouped.matmul import grouped_matmul

R, D, F, E = 64, 6, 5, 4
SIZES = {
    "even": [16, 16, 16, 16], "uneven": [0, 42, 1, 21], "one": [64, 0, 0, 0], "last": [0, 0, 0, 64],
    "tail": [11, 0, 19, 3], "nothing": [0, 0, 0, 0],
    "all reserved": [24, 0, 24, 0], "one more": [25, 0, 39, 0]}


@pytest.fixture(scope="module")
def product():
  """(expected, backend) -> a compiled function of (x, w, size_E, dy) to (y, dx, dw)."""

  @functools.cache
  def make(expected, backend):
    def call(x, w, size_E, dy):
      one = lambda x, w: grouped_matmul(x, w, size_E, expected=expected, backend=backend)
      y, pullback = jax.vjp(one, x, w)
      return y, *pullback(dy)

    return jax.jit(call)

  return make


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "expected, backend", [(64, "slots"), (16, "slots"), (1, "slots"), (None, "ragged_dot"),
                          (None, "megablox"), (None, "megablox:16x8x8")])
def test_equals_a_loop(product, expected, backend, sizes):
  """64, 16 and 1 rows expected of 64: all reserved unless uneven, most in blocks, none reserved.

  Megablox is interpreted, with its own tiles, which are larger than all else here, and with smaller ones.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, dy = (jax.random.normal(k, s) for k, s in zip(keys, [(R, D), (E, D, F), (R, F)], strict=True))
  strict = "standard" if backend.startswith("megablox") else "strict"  # the library's kernel mixes types
  with jax.numpy_dtype_promotion(strict):
    got = product(expected, backend)(x, w, jnp.array(sizes), dy)

  y, dx, dw = np.zeros((R, F)), np.zeros((R, D)), np.zeros((E, D, F))
  for r, e in enumerate(np.repeat(np.arange(E), sizes)):
    y[r], dx[r] = x[r] @ w[e], w[e] @ dy[r]
    dw[e] += np.outer(x[r], dy[r])
  for a, b in zip(got, (y, dx, dw), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)  # float32 sums of up to 64 products


def test_the_cases_above_are_what_they_say():
  assert [reserved_and_block(expected, E) for expected in (64, 16, 1)] == [(24, 8), (8, 8), (0, 8)]
  assert [reserved_and_block(8 * share, 8) for share in (512, 520)] == [(512, 32), (576, 32)]
  assert reserved_and_block(8 * 1024, 8) == (1024, 64)
  assert set(BACKENDS) == {"slots", "ragged_dot", "megablox"}


@pytest.mark.parametrize("expected", [300, 1])
def test_bfloat16_weight_gradient_is_summed_in_float32(expected):
  """300 rows of ones: a bfloat16 running sum would stop at 256."""
  x, w = jnp.ones((300, 4), jnp.bfloat16), jnp.ones((1, 4, 4))
  total = lambda w: grouped_matmul(x, w, jnp.array([300]), expected=expected).astype(jnp.float32).sum()
  np.testing.assert_array_equal(jax.grad(total)(w), 300)


@pytest.mark.parametrize("backend, message", [
    ("blocks", "backend='blocks' is unknown"),
    ("megablox:128x128", "backend='megablox:128x128' is not megablox:MxKxN with three tile sizes"),
    ("slots:8x8x8", "backend='slots:8x8x8' is unknown")])
def test_unknown_backends(backend, message):
  with pytest.raises(UserError, match=message):
    grouped_matmul(jnp.ones((4, 2)), jnp.ones((2, 2, 2)), jnp.array([2, 2]), backend=backend)


def test_megablox_is_for_one_device(mesh):
  with partitioning.use(mesh), pytest.raises(UserError, match="is for one device and the mesh has 8"):
    grouped_matmul(jnp.ones((4, 2)), jnp.ones((2, 2, 2)), jnp.array([2, 2]), backend="megablox")
