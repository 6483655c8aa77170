from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.models import build
from sparse_experts.models.blocks import Context
from sparse_experts.models.stack import Stack
from sparse_experts.models.template import fold
from sparse_experts.models.text import make_tokens
from tests.models.tiny import VOCAB, init, jit, tiny


def stack_case(**model):
  """A stack `[dense, sparse] x 2`, its arrays, and an input with a causal mask."""
  stack = build(tiny(router=dict(jitter=0.1), dropout=0.1, **model), VOCAB).stacks["decoder"]
  params, buffers = init(stack)
  place_L = jnp.arange(8)
  segment_BL = jnp.ones((2, 8), jnp.int32)
  context = Context(mask_BLM=jnp.broadcast_to(place_L[None] <= place_L[:, None], (2, 8, 8)),
                    tokens=make_tokens(segment_BL, segment_BL),
                    position_BL=jnp.broadcast_to(place_L, (2, 8)))
  return stack, params, buffers, context, jax.random.normal(jax.random.key(1), (2, 8, 16))


def value_and_gradient(run, params, x_BLD):
  """Of a scalar that every output and every sparse layer's losses enter."""

  def scalar(params, x_BLD):
    y_BLD, routings = run(params, x_BLD)
    losses = {name: r.losses for name, r in routings.items()}
    return jnp.sum(jnp.sin(y_BLD)) + sum(jnp.sum(a) for a in jax.tree.leaves(losses)), losses

  return jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(params, x_BLD)


def assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), a, b)


@pytest.mark.slow
def test_scan_equals_a_loop_over_layers_and_remat_equals_none():
  """With dropout and jitter on: keys, too, go by layer. Tolerance: sums of float32 in another order."""
  stack, params, buffers, context, x_BLD = stack_case()
  key = jax.random.key(2)

  def scanned(stack):
    return lambda params, x_BLD: stack(params, buffers, x_BLD, context, key=key)[:2]

  def loop(params, x_BLD):
    routings = {}
    for layer in range(4):
      s, _, i = stack.where(layer)
      block = stack.templates[s][i].bind(stack.arrays(params, layer))
      x_BLD, found, _ = block(x_BLD, context, key=fold(key, layer))
      routings |= {f"decoder/{layer:02d}": routing for routing in found.values()}
    return x_BLD, routings

  expected = value_and_gradient(loop, params, x_BLD)
  assert_close(value_and_gradient(scanned(stack), params, x_BLD), expected)
  rematerialized, *_ = stack_case(remat=True)
  assert rematerialized.remat
  assert_close(value_and_gradient(scanned(rematerialized), params, x_BLD), expected)


def test_each_block_is_recomputed_on_its_own():
  """A pattern of two blocks: two calls to recompute in the scan's body, not one that holds both at once."""
  for remat, calls in ((True, 2), (False, 0)):
    stack, params, buffers, context, x_BLD = stack_case(remat=remat)
    program = jax.make_jaxpr(lambda p, s=stack, b=buffers, c=context, x=x_BLD: s(p, b, x, c)[0])(params)
    assert str(program).count("prevent_cse=") == calls  # a field of jax.checkpoint's, whose name has moved


class Noise(nnx.Module):
  """A block that adds noise and nothing else."""

  sparse_parts: ClassVar = {}

  def __init__(self):
    self.w = nnx.Param(jnp.zeros(1), axes=("embed",))

  def __call__(self, x_BLD, context, cache=None, key=None):
    return x_BLD + jax.random.normal(key, x_BLD.shape), {}, None


def test_each_layer_draws_its_own_noise():
  stack = Stack("decoder", ["a"] * 3 + ["b"], lambda kind, key: Noise())
  params, buffers = stack.init(jax.random.key(0))
  key = jax.random.key(1)
  y_BLD, _, _ = stack(params, buffers, jnp.zeros((2, 3, 4)), None, key=key)
  expected = sum(jax.random.normal(fold(key, layer), (2, 3, 4)) for layer in range(4))
  np.testing.assert_allclose(y_BLD, expected, rtol=1e-6, atol=1e-6)
