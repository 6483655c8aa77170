"""Mixture-of-Depths: the chosen pass through the block among themselves, the others pass by."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.models import build, describe
from sparse_experts.models.blocks import Block, Context, FeedForward
from sparse_experts.models.depth import DepthBlock
from sparse_experts.models.rope import Rope
from sparse_experts.moe import Tokens
from tests.models.tiny import VOCAB, init, jit, make_batch, tiny

B, L, D = 2, 8, 16
ROUNDING = dict(rtol=1e-4, atol=1e-5)  # float32 sums in another order


def block_of(share, rope=False):
  ffn = FeedForward(D, 24, "swiglu", key=jax.random.key(1))
  block = Block(D, dict(num_heads=2, head_dim=8, rope=Rope() if rope else None), ffn, key=jax.random.key(0))
  depth = DepthBlock(block, share, D, key=jax.random.key(2))
  depth.w[...] *= 50
  return depth


def inputs(padding=True):
  x_BLD = jax.random.normal(jax.random.key(3), (B, L, D))
  segment_BL = jnp.ones((B, L), jnp.int32).at[0, 5:].set(2)
  if padding:
    segment_BL = segment_BL.at[1, 3:].set(0)
  context = Context(
      mask_BLM=segment_BL[:, :, None] == segment_BL[:, None, :], tokens=Tokens(mask=segment_BL > 0),
      position_BL=jnp.broadcast_to(jnp.arange(L), (B, L)),
      bias_HLM=jax.random.normal(jax.random.key(4), (2, L, L)))
  return x_BLD, context


@pytest.mark.parametrize("rope", [True, False])
def test_the_chosen_pass_through_alone(rope):
  """Row by row: the C tokens with the largest score, cut out, and the plain block on them alone."""
  depth, (x_BLD, context) = block_of(0.5, rope), inputs()
  if rope:
    context = context.replace(bias_HLM=None)
  y_BLD, routings, _ = jax.jit(lambda x: depth(x, context))(x_BLD)
  assert routings["ffn"].metrics == {"processed": (4 + 3, 8 + 3)} and routings["ffn"].token is None
  r_BL = np.asarray(x_BLD @ depth.w[...])[..., 0]
  for b in range(B):
    real = np.flatnonzero(np.asarray(context.tokens.mask)[b])
    chosen = np.sort(real[np.argsort(-r_BL[b, real], kind="stable")[:4]])
    alone = Context(
        mask_BLM=context.mask_BLM[b][chosen][:, chosen][None],
        tokens=Tokens(mask=jnp.ones((1, len(chosen)), bool)),
        position_BL=context.position_BL[b][chosen][None],
        bias_HLM=None if rope else context.bias_HLM[:, chosen][:, :, chosen])
    x_1CD = x_BLD[b][chosen][None]
    through, _, _ = depth.block(x_1CD, alone)
    expected = np.array(x_BLD[b])
    expected[chosen] += r_BL[b, chosen, None] * np.asarray(through - x_1CD)[0]
    np.testing.assert_allclose(y_BLD[b], expected, **ROUNDING)


def test_all_of_the_tokens_at_weight_one_is_the_block():
  depth, (x_BLD, context) = block_of(1.0), inputs(padding=False)
  depth.w[...] = jnp.zeros((D, 1)).at[0].set(1.0)
  x_BLD = x_BLD.at[..., 0].set(1.0)
  np.testing.assert_allclose(depth(x_BLD, context)[0], depth.block(x_BLD, context)[0], **ROUNDING)


def test_ties_go_to_the_earlier_token_and_padding_may_lie_anywhere():
  """All scores alike: the first four real ones, in whatever places; moving padding moves nothing else."""
  depth, (x_BLD, context) = block_of(0.5, rope=True), inputs(padding=False)
  depth.w[...] = jnp.zeros((D, 1)).at[0].set(1.0)
  x_BLD = x_BLD.at[..., 0].set(1.0)
  context = context.replace(bias_HLM=None)

  @jax.jit
  def at(place_L, mask_L):
    """The real tokens of the row stand at these places; the others are padding."""
    segment_1L = mask_L.astype(jnp.int32)[None]
    y_1LD, _, _ = depth(x_BLD[:1, place_L], context.replace(
        mask_BLM=segment_1L[:, :, None] == segment_1L[:, None, :], tokens=Tokens(mask=mask_L[None]),
        position_BL=place_L[None]))
    return y_1LD[0]

  straight, mask_L = jnp.arange(L), jnp.arange(L) < 6
  y_LD = at(straight, mask_L)
  moved = np.flatnonzero(np.abs(y_LD - x_BLD[0]).max(-1) > 1e-3)
  assert moved.tolist() == [0, 1, 2, 3]
  spread = jnp.array([6, 0, 1, 7, 2, 3, 4, 5])  # padding first and in the middle
  np.testing.assert_allclose(at(spread, mask_L[spread])[mask_L[spread]], y_LD[:6], **ROUNDING)


def test_the_router_learns_and_padding_does_not_leak():
  depth, (x_BLD, context) = block_of(0.75), inputs()
  graphdef, w = nnx.split(depth)

  @jax.jit
  def loss(w, x_BLD):
    y_BLD, _, _ = nnx.merge(graphdef, w)(x_BLD, context)
    return jnp.where(context.tokens.mask[..., None], jnp.sin(y_BLD), 0.0).sum()

  poisoned = jnp.where(context.tokens.mask[..., None], x_BLD, 1e6)
  grad = jax.grad(loss)(w, x_BLD)
  assert jnp.abs(grad["w"][...]).max() > 0
  np.testing.assert_allclose(loss(w, poisoned), loss(w, x_BLD), **ROUNDING)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), jax.grad(loss)(w, poisoned), grad)


def config_of(**model):
  config = tiny("seq2seq", num_layers=2, num_experts=0, depth_layers=(1,), depth_capacity=0.25, **model)
  config.data.update(dict(length=12, target_length=6))
  return config


@pytest.mark.slow
def test_a_model_on_a_mesh_and_by_itself():
  """From a config line: the same logits and gradients, and no token crosses devices."""
  model, batch = build(config_of(), VOCAB), make_batch(rows=8)
  params, buffers = init(model)
  assert params["encoder"]["blocks"]["0"]["1"]["w"].shape == (1, D, 1)
  _, routings = jax.eval_shape(model.apply, params, buffers, batch)
  assert list(routings) == ["encoder/01"] and not model.sparse_layers

  def loss(params, batch):
    return jnp.sin(model.apply(params, buffers, batch)[0]).mean()

  f = jax.value_and_grad(loss)
  expected = jit(f)(params, batch)
  mesh = partitioning.make_mesh(2, 2, 2)
  with partitioning.use(mesh):
    sharded = jax.device_put(params, partitioning.shardings(model.axes, mesh))
    rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
    compiled = jit(f).lower(sharded, rows).compile()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), compiled(sharded, rows), expected)
  assert not re.search(r" all-to-all(?:-start)?\(", compiled.as_text())


def test_flops_by_hand():
  """Three of twelve tokens, each of which sees three."""
  inner, share = 16, 3 / 12
  row = next(row for row in describe(config_of(), VOCAB)["layers"] if row["name"] == "encoder/01")
  assert row["kind"] == "depth"
  expected = share * (2 * 3 * D * 24 + 2 * 4 * D * inner + 4 * inner * 3) + 2 * D
  assert row["flops_per_token"] == pytest.approx(expected)
  assert row["executed_flops_per_token"] == pytest.approx(expected)
