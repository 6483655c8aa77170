"""Experts in the attention's projections: dense attention when there is one, and the models around it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import moe, partitioning
from sparse_experts.models import build, describe
from sparse_experts.models.attention import Attention, SparseAttention
from sparse_experts.models.rope import Rope
from sparse_experts.moe import LinearExperts, MoELayer, TopKRouter
from tests.models.tiny import VOCAB, init, jit, make_batch, one_segment, tiny

D, H, P = 16, 2, 8
ROUNDING = dict(rtol=1e-4, atol=1e-5)  # float32 sums in another order, through two layers


@pytest.mark.parametrize("rope", [True, False])
def test_one_expert_is_dense_attention(rope):
  rope = Rope() if rope else None
  """With the dense weights side by side; the gate of one expert is 1."""
  dense = Attention(D, H, P, rope=rope, key=jax.random.key(0))
  experts = LinearExperts(1, D, 3 * H * P, variance=1.0, rngs=nnx.Rngs(1))
  flat = [w[...].reshape(D, H * P) for w in (dense.query, dense.key, dense.value)]
  experts.w[...] = jnp.concatenate(flat, axis=1)[None]
  sparse = SparseAttention(D, H, P, MoELayer(TopKRouter(D, 1, rngs=nnx.Rngs(2)), experts), rope=rope,
                           key=jax.random.key(0))
  x_BLD, position_BL = jax.random.normal(jax.random.key(3), (2, 5, D)), jnp.arange(10).reshape(2, 5)
  mask_BLM = jnp.tril(jnp.ones((5, 5), bool))[None].repeat(2, 0)

  @jit
  def both_ways(x_BLD):
    q, keys_values, _ = sparse.project(x_BLD, position_BL, moe.Tokens(), None)
    plain = dense(dense.queries(x_BLD, position_BL), dense.keys_values(x_BLD, position_BL), mask_BLM)
    return sparse(q, keys_values, mask_BLM), plain

  np.testing.assert_allclose(*both_ways(x_BLD), **ROUNDING)


def test_initial_projections_vary_as_dense_ones():
  """T5's queries are smaller: their scale holds that of the scores."""
  params, _ = init(build(tiny("seq2seq", num_layers=1, moe_every=1, moe_place="attention"), VOCAB))
  w_EDF = params["encoder"]["blocks"]["0"]["0"]["attention"]["projection"]["experts"]["w"][0]
  std = w_EDF.reshape(-1, 3, H * P).std((0, 2))
  np.testing.assert_allclose(std, [(1 / (D * P))**0.5, D**-0.5, D**-0.5], rtol=0.1)  # 1024 draws each


@functools.cache
def both():
  model = build(tiny(num_layers=2, moe_every=1, moe_place="both"), VOCAB, "dropless", edit=moe.force)
  params, buffers = init(model)
  return model, params, buffers


def test_both_parts_of_a_layer_have_routings():
  model, params, buffers = both()
  assert sorted(model.sparse_layers) == ["decoder/00", "decoder/00/attention", "decoder/01",
                                         "decoder/01/attention"]
  batch = make_batch()
  apply = jit(functools.partial(model.apply, trace=True))
  none = {name: np.full((2, 16), -1, np.int32) for name in model.sparse_layers}
  logits, routings = apply(params, buffers, batch, edits=none)
  assert list(routings) == sorted(model.sparse_layers)
  later = batch["decoder_inputs"].copy()
  later[:, 9:] = 5
  other, _ = apply(params, buffers, {**batch, "decoder_inputs": later}, edits=none)
  np.testing.assert_allclose(other[:, :9], logits[:, :9], **ROUNDING)  # causal

  wanted = none["decoder/01"].copy()
  wanted[1, 3] = (np.asarray(routings["decoder/01/attention"].expert).reshape(2, 16)[1, 3] + 1) % 4
  _, after = apply(params, buffers, batch, edits={**none, "decoder/01/attention": wanted})
  moved = {n: int((after[n].expert != routings[n].expert).sum()) for n in after}
  assert moved["decoder/01/attention"] == 1 and moved["decoder/00"] == moved["decoder/00/attention"] == 0


def test_cached_decoding_equals_teacher_forcing():
  model, params, buffers = both()
  model = build(tiny(num_layers=2, moe_every=1, moe_place="both"), VOCAB, "dropless")
  batch = one_segment(make_batch())
  expected, _ = jit(model.apply)(params, buffers, batch)
  cache, decode = model.init_cache(2, length=16), jit(model.decode)
  ids = batch["decoder_inputs"]
  logits, cache = decode(params, buffers, cache, ids[:, :5])
  np.testing.assert_allclose(logits, expected[:, :5], **ROUNDING)
  for i in range(5, 8):
    logits, cache = decode(params, buffers, cache, ids[:, i:i + 1])
    np.testing.assert_allclose(logits[:, 0], expected[:, i], **ROUNDING)


@pytest.mark.slow
def test_a_mesh_gives_the_same_numbers_and_gradients():
  """Projections are not split over `model`; each sparse layer makes its four all-to-alls."""
  config = tiny(num_layers=1, moe_every=1, moe_place="both", capacity_factor=1.0, min_capacity=1)
  model, batch = build(config, VOCAB), make_batch(rows=8)
  params, buffers = init(model)

  def loss(params, batch):
    logits_BLV, routings = model.apply(params, buffers, batch)
    return jnp.sin(logits_BLV).mean(), sum(r.metrics["dropped"][0] for r in routings.values())

  f = jax.value_and_grad(loss, has_aux=True)
  expected = jit(f)(params, batch)
  mesh = partitioning.make_mesh(2, 2, 2)
  with partitioning.use(mesh):
    sharded = jax.device_put(params, partitioning.shardings(model.axes, mesh))
    rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
    compiled = jit(f).lower(sharded, rows).compile()
  actual = compiled(sharded, rows)
  assert len(re.findall(r" all-to-all(?:-start)?\(", compiled.as_text())) == 8
  assert actual[0][1] > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), actual, expected)


@pytest.mark.parametrize("place", ["attention", "both"])
def test_flops_and_parameters_by_hand(place):
  config = tiny(num_layers=1, moe_every=1, moe_place=place, dispatch="einsum", capacity_factor=2.0,
                capacity_rule="vmoe_paper")
  config.data.length = 10
  counts = describe(config, VOCAB)
  one, inner, E, C, T = 3 * D * 24, H * P, 4, 8, 16
  routers = 1 + (place == "both")
  rows, slots = E * C / T, E * C
  assert counts["flops"]["router"] == routers * 2 * D * E
  assert counts["flops"]["attention"] == 2 * 4 * D * inner + 4 * inner * 5.5
  assert counts["flops"]["ffn"] == 2 * one
  executed = counts["executed_flops"]
  assert executed["attention"] == 2 * (3 * rows + 1) * D * inner + 4 * inner * 10
  assert executed["ffn"] == 2 * one * (rows if place == "both" else 1)
  assert executed["dispatch"] == 2 * slots * (D + 3 * inner) + (2 * slots * 2 * D if place == "both" else 0)
  idle = 3 * (3 * D * inner + (one if place == "both" else 0))
  assert counts["params_total"] - counts["params_active"] == idle
  assert counts["layers"][0]["kind"] == "sparse"


def test_the_backend_reaches_ffn_and_projections():
  """All grouped products of a model whose config names the other backend are the library's."""
  config = tiny(num_layers=1, moe_every=1, moe_place="both", backend="ragged_dot")
  shapes = jax.eval_shape(build(config, VOCAB).init, jax.random.key(0))
  batch = make_batch()
  program = str(jax.make_jaxpr(lambda p, b: build(config, VOCAB).apply(p, b, batch)[0])(*shapes))
  assert program.count("ragged_dot_general[") == 4  # queries, keys and values at once; three of a gated FFN
