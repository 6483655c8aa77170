"""ST-MoE's blocks: a dense FFN after each sparse one; experts with an activation and a bias of their own."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_experts.config import dense_twin
from sparse_experts.models import build, describe
from sparse_experts.models.blocks import Block, Context, FeedForward
from sparse_experts.moe import Tokens
from tests.models.tiny import VOCAB, init, jit, make_batch, tiny

D, F, E = 16, 24, 4


def block_of(extra):
  ffn = FeedForward(D, F, "relu", key=jax.random.key(0))
  return Block(D, dict(num_heads=2, head_dim=8, rope=None), ffn, extra=extra, key=jax.random.key(2))


def test_the_extra_ffn_comes_last_with_norm_and_residual_of_its_own():
  """y + FFN(norm(y)), y being what the block without it gives; the formula in numpy."""
  extra = FeedForward(D, F, "geglu", key=jax.random.key(3))
  block = block_of(extra)
  block.extra_norm.scale[...] = jnp.linspace(0.5, 1.5, D)
  x_BLD = jax.random.normal(jax.random.key(4), (2, 8, D))
  context = Context(mask_BLM=jnp.ones((2, 8, 8), bool), tokens=Tokens(mask=jnp.ones((2, 8), bool)))
  y_BLD = np.asarray(jit(lambda x: block_of(None)(x, context)[0])(x_BLD), np.float64)
  h_BLD = y_BLD / np.sqrt((y_BLD**2).mean(-1, keepdims=True) + 1e-6) * np.linspace(0.5, 1.5, D)
  w_gate, w_in, w_out = (np.asarray(w[...], np.float64) for w in (extra.w_gate, extra.w_in, extra.w_out))
  gelu = lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
  expected_BLD = y_BLD + (gelu(h_BLD @ w_gate) * (h_BLD @ w_in)) @ w_out
  found_BLD = jit(lambda x: block(x, context)[0])(x_BLD)
  np.testing.assert_allclose(found_BLD, expected_BLD, rtol=1e-5, atol=1e-5)


def test_parameters_and_flops_by_hand():
  plain = tiny(num_layers=2, activation="geglu")
  found, without = (describe(c, VOCAB) for c in (
      tiny(num_layers=2, activation="geglu", extra_ffn=True, multiplicative_bias=True), plain))
  ffn = 3 * D * F
  assert found["params_total"] - without["params_total"] == ffn + D + E * F
  assert found["params_active"] - without["params_active"] == ffn + D + F
  assert found["flops"]["ffn"] - without["flops"]["ffn"] == 2 * ffn
  assert found["executed_flops"]["ffn"] - without["executed_flops"]["ffn"] == 2 * ffn
  ungated = describe(tiny(num_layers=2, activation="geglu", expert_activation="gelu"), VOCAB)
  assert without["params_total"] - ungated["params_total"] == E * D * F


def test_the_dense_twin_keeps_the_extra_ffn_and_the_experts_activation():
  config = tiny(num_layers=2, activation="geglu", expert_activation="gelu", extra_ffn=True, router=dict(k=2))
  twin = describe(dense_twin(config), VOCAB)
  assert [layer["hidden"] for layer in twin["layers"]] == [F, 2 * F]
  router = D * E
  assert describe(config, VOCAB)["params_active"] - twin["params_total"] == router


def test_gradients_reach_all_of_it():
  config = tiny(num_layers=2, activation="geglu", expert_activation="gelu", extra_ffn=True,
                multiplicative_bias=True, router=dict(k=2))
  model = build(config, VOCAB)
  params, buffers = init(model)
  batch = make_batch()
  loss = lambda params: (model.apply(params, buffers, batch)[0] ** 2).mean()
  grads = jit(jax.grad(loss))(params)
  for part in ("extra", "extra_norm", "ffn"):
    for g in jax.tree.leaves(grads["decoder"]["blocks"]["0"]["1"][part]):
      assert jnp.isfinite(g).all() and jnp.any(g)
