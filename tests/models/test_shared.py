"""Shared experts: an FFN beside the routed ones, which no drop and no router touches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.config import dense_twin
from sparse_experts.models import build, describe
from sparse_experts.models.blocks import SharedExperts
from sparse_experts.moe import Experts, MoELayer, Tokens, TopKRouter
from tests.models.tiny import VOCAB, init, jit, make_batch, tiny

D, F, E = 16, 24, 4
ROUNDING = dict(rtol=1e-5, atol=1e-5)  # float32, tens of terms of order 1, one product or two


def layer_of(shared, factor=None):
  router = TopKRouter(D, E, rngs=nnx.Rngs(0))
  return MoELayer(router, Experts(E, D, F, "gelu", init_scale=1.0, rngs=nnx.Rngs(1)), shared=shared,
                  capacity_factor=factor, min_capacity=1)


@pytest.mark.parametrize("gated", [False, True])
def test_it_is_added_for_every_real_token(gated):
  """Tokens that every expert dropped have the shared output alone; padding, NaN in it too, has none."""
  shared = SharedExperts(D, 2 * F, "swiglu", gated=gated, key=jax.random.key(3))
  x_BLD = jax.random.normal(jax.random.key(0), (2, 8, D)).at[0, 3].set(jnp.nan)
  mask_BL = jnp.ones((2, 8), bool).at[0, 3].set(False)
  with_shared, without = layer_of(shared, 0.25), layer_of(None, 0.25)
  y_BLD, routing = jit(lambda x: with_shared(x, Tokens(mask=mask_BL)))(x_BLD)
  routed_BLD, _ = jit(lambda x: without(x, Tokens(mask=mask_BL)))(x_BLD)
  x_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)
  h_BLF = jax.nn.silu(x_BLD @ shared.ffn.w_gate[...]) * (x_BLD @ shared.ffn.w_in[...])
  expected_BLD = h_BLF @ shared.ffn.w_out[...]
  if gated:
    expected_BLD *= jax.nn.sigmoid(x_BLD @ shared.gate[...])
  np.testing.assert_allclose(y_BLD, routed_BLD + expected_BLD, **ROUNDING)
  assert routing.metrics["token_dropped"][0] > 0 and not y_BLD[0, 3].any()
  assert (jnp.abs(y_BLD).sum(-1)[mask_BL] > 0).all()


def test_flops_and_parameters_by_hand():
  config = tiny(num_layers=1, moe_every=1, shared_experts=2, shared_gate=True, dispatch="scatter",
                capacity_factor=2.0, capacity_rule="vmoe_paper")
  config.data.length = 10
  plain = tiny(num_layers=1, moe_every=1)
  plain.data.length = 10
  with_shared, without = describe(config, VOCAB), describe(plain, VOCAB)
  one = 3 * D * F
  assert with_shared["params_total"] - without["params_total"] == 2 * one + D
  assert with_shared["params_active"] - without["params_active"] == 2 * one + D
  assert with_shared["flops"]["ffn"] == 3 * 2 * one + 2 * D
  assert with_shared["executed_flops"]["ffn"] == 2 * one * (E * 8 / 16) + 2 * 2 * one + 2 * D


def test_the_dense_twin_is_as_wide_as_all_that_work_on_a_token():
  twin = dense_twin(tiny(shared_experts=2, router=dict(k=2)))
  assert [row["hidden"] for row in describe(twin, VOCAB)["layers"]] == [F, 4 * F, F, 4 * F]


def test_a_model_has_them_from_a_config_line():
  model = build(tiny(shared_experts=1), VOCAB)
  params, buffers = init(model)
  assert params["decoder"]["blocks"]["0"]["1"]["ffn"]["shared"]["ffn"]["w_in"].shape == (2, D, F)
  logits, _ = jit(model.apply)(params, buffers, make_batch())
  assert jnp.isfinite(logits).all()


def test_gating_dropout_from_a_config_line():
  """With a key and rate 1 no token leaves its machine; without a key nothing changes."""
  config = tiny(gating_dropout=dict(rate=1.0, machines=2), num_layers=1, moe_every=1)
  model, plain = build(config, VOCAB), build(tiny(num_layers=1, moe_every=1), VOCAB)
  batch = make_batch(rows=4)
  params, buffers = init(model)
  call = jit(lambda key: model.apply(params, buffers, batch, key=key, trace=True)[1]["decoder/00"])
  routing = call(jax.random.key(0))
  home_G1 = np.arange(4)[:, None] * 2 // 4
  np.testing.assert_array_equal((routing.expert // 2 == home_G1)[routing.valid], True)
  logits, _ = jit(model.apply)(params, buffers, batch)
  np.testing.assert_array_equal(logits, jit(plain.apply)(params, buffers, batch)[0])


def test_they_may_have_a_width_of_their_own():
  """Any width, and the dense twin is as wide as it and the chosen experts together."""
  config = tiny(shared_experts=2, shared_dim=7, router=dict(k=2))
  params, _ = jax.eval_shape(build(config, VOCAB).init, jax.random.key(0))
  assert params["decoder"]["blocks"]["0"]["1"]["ffn"]["shared"]["ffn"]["w_out"].shape == (2, 7, D)
  twin = describe(dense_twin(config), VOCAB)
  assert [row["hidden"] for row in twin["layers"]] == [F, 2 * F + 7, F, 2 * F + 7]
