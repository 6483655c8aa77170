"""Every backend against a loop, forward and backward."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe.grouped import kernels
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
    "expected, backend",
    [(64, "slots"), (16, "slots"), (1, "slots"), (None, "ragged_dot"), (None, "tokamax")])
def test_equals_a_loop(product, expected, backend, sizes):
  """64, 16 and 1 rows expected of 64: all reserved unless uneven, most in blocks, none reserved.

  Of tokamax what it has for CPUs.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, dy = (jax.random.normal(k, s) for k, s in zip(keys, [(R, D), (E, D, F), (R, F)], strict=True))
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
  assert set(BACKENDS) == {"slots", "ragged_dot", "tokamax"}


@pytest.mark.parametrize("expected", [300, 1])
def test_bfloat16_weight_gradient_is_summed_in_float32(expected):
  """300 rows of ones: a bfloat16 running sum would stop at 256."""
  x, w = jnp.ones((300, 4), jnp.bfloat16), jnp.ones((1, 4, 4))
  total = lambda w: grouped_matmul(x, w, jnp.array([300]), expected=expected).astype(jnp.float32).sum()
  np.testing.assert_array_equal(jax.grad(total)(w), 300)


@pytest.mark.parametrize("backend, message", [
    ("blocks", "backend='blocks' is unknown"),
    ("tokamax:8", "backend='tokamax:8' is unknown")])
def test_unknown_backends(backend, message):
  with pytest.raises(UserError, match=message):
    grouped_matmul(jnp.ones((4, 2)), jnp.ones((2, 2, 2)), jnp.array([2, 2]), backend=backend)


RAGGED_DOT = jax.lax.ragged_dot  # as it is


def _real(x_RD, size_E):
  return (jnp.arange(x_RD.shape[0]) < size_E.sum())[:, None]


@jax.custom_vjp
def uninitialised(x_RD, w_EDF, size_E):
  """A kernel that writes only what rows are summed into; nan stands for memory that nobody wrote."""
  return jnp.where(_real(x_RD, size_E), RAGGED_DOT(x_RD, w_EDF, size_E), jnp.nan)


def _backward(operands, dy_RF):
  x_RD, w_EDF, size_E = operands
  dx_RD, dw_EDF = jax.vjp(lambda x, w: RAGGED_DOT(x, w, size_E), x_RD, w_EDF)[1](dy_RF)
  has_rows_E11 = (size_E > 0)[:, None, None]
  return jnp.where(_real(x_RD, size_E), dx_RD, jnp.nan), jnp.where(has_rows_E11, dw_EDF, jnp.nan), None


uninitialised.defvjp(lambda *operands: (uninitialised(*operands), operands), _backward)


@pytest.mark.parametrize("backend", ["slots", "ragged_dot", "tokamax"])
def test_memory_that_nobody_wrote_reaches_nothing(backend, monkeypatch):
  """Rows past the end hold nan and get nan as cotangents, and kernels leave nan where no row is summed."""
  monkeypatch.setattr(jax.lax, "ragged_dot", uninitialised)
  monkeypatch.setattr(kernels, "product", uninitialised)
  x, w, dy = (jax.random.normal(key, shape) for key, shape in zip(
      jax.random.split(jax.random.key(0), 3), [(R, D), (E, D, F), (R, F)], strict=True))

  @jax.jit
  def call(x, w, size_E, dy):
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, size_E, backend=backend), x, w)
    return y, *pullback(dy)

  for sizes in map(jnp.array, SIZES.values()):
    past = ~_real(x, sizes)
    got = call(jnp.where(past, jnp.nan, x), w, sizes, jnp.where(past, jnp.nan, dy))
    for a, b in zip(got, call(x, w, sizes, dy), strict=True):
      np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(a).all() for a in got)


@pytest.mark.parametrize("platform, reasons", [("tpu", "no mosaic"), ("gpu", "no mosaic; no triton")])
def test_a_kernel_that_cannot_run_says_so(platform, reasons, monkeypatch):
  def ragged_dot(x, w, sizes, implementation):
    raise NotImplementedError(f"no {implementation}")

  monkeypatch.setattr("tokamax.ragged_dot", ragged_dot)
  monkeypatch.setattr(partitioning, "platform", lambda: platform)
  message = (rf"has no {platform} kernel for rows \(64, 6\) and experts \(4, 6, 5\) in float32 \({reasons}\)"
             "; choose 'ragged_dot'")
  with pytest.raises(UserError, match=f"backend='tokamax' {message}"):
    grouped_matmul(jnp.ones((R, D)), jnp.ones((E, D, F)), jnp.array(SIZES["even"]), backend="tokamax")


def test_without_tokamax(monkeypatch):
  monkeypatch.setitem(sys.modules, "tokamax", None)
  with pytest.raises(UserError, match=r"needs the package tokamax; pip install -e '.\[kernels\]' ins"):
    grouped_matmul(jnp.ones((R, D)), jnp.ones((E, D, F)), jnp.array(SIZES["even"]), backend="tokamax")
