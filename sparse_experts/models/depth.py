"""Mixture-of-Depths: a block that processes some tokens of each row and skips the others."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_experts.models.attention import KeysValues
from sparse_experts.models.blocks import Block, Context
from sparse_experts.moe import MoELayer, Routing
from sparse_experts.moe.routing import scores


class DepthBlock(nnx.Module):
  """y_t = x_t + r_t (block(x)_t - x_t) for the C tokens of a row with the largest r_t = x_t . w, else x_t.

  C is `share` of the row's length, rounded up; ties go to the earlier token, and padding is taken last and
  not changed. The chosen tokens attend to each other only, with their own positions. Whether a token is
  chosen depends on later ones, so only encoders have such blocks, and only dense ones. After Raposo et al.
  2024 (Mixture-of-Depths), from secondary sources: formula and share are not checked against the paper.
  w's first values, ties and padding are our choices; sampling from a decoder by a second, causal router is
  not implemented.

  Its routing has no list and no losses, only the metric `processed`.
  """

  sparse_parts: dict[str, MoELayer] = {}  # noqa: RUF012  there are none

  def __init__(self, block: Block, share: float, d: int, *, key: jax.Array):
    self.block, self.share = block, share
    self.w = nnx.Param(0.02 * jax.random.normal(key, (d, 1)), axes=("embed", "router"))

  def chosen(self, length: int) -> int:
    """C, of a row of `length`."""
    return math.ceil(self.share * length)

  def __call__(self, x_BLD: jax.Array, context: Context, cache: dict[str, KeysValues] | None = None,
               key: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any], None]:
    """As of a `Block`, without a cache."""
    if cache is not None:
      raise ValueError("a Mixture-of-Depths block sees a whole row, which cached decoding does not have")
    mask_BL = context.tokens.mask
    with jax.named_scope("router"):
      r_BL = scores.linear(x_BLD, self.w[...])[..., 0]
      score_BL = jnp.where(mask_BL, jax.lax.stop_gradient(r_BL), -jnp.inf)
      best_BL = jnp.argsort(-score_BL, axis=-1, stable=True)
      place_BC = jnp.sort(best_BL[:, :self.chosen(x_BLD.shape[1])], axis=-1)
    take = lambda a_BL: jnp.take_along_axis(a_BL, place_BC, axis=1)
    take_rows = lambda a_BLX: jnp.take_along_axis(a_BLX, place_BC[..., None], axis=1)
    mask_BCM = take_rows(context.mask_BLM)
    at = context.replace(
        mask_BLM=jnp.take_along_axis(mask_BCM, place_BC[:, None], axis=2),
        tokens=jax.tree.map(take, context.tokens),
        position_BL=None if context.position_BL is None else take(context.position_BL),
        bias_HLM=None if context.bias_HLM is None else _both(context.bias_HLM, place_BC))
    with jax.named_scope("dispatch"):
      x_BCD = take_rows(x_BLD)
    y_BCD, _, _ = self.block(x_BCD, at, None, key)
    with jax.named_scope("combine"):
      real_BC1 = take(mask_BL)[..., None]
      # Both are masked, so that neither's gradient meets the other's values in padding.
      gate_BC1 = jnp.where(real_BC1, take(r_BL)[..., None], 0.0).astype(x_BLD.dtype)
      delta_BCD = gate_BC1 * jnp.where(real_BC1, y_BCD - x_BCD, 0)
      # Combine by a gather: the index of each position among the chosen ones.
      hit_BLC = place_BC[:, None, :] == jnp.arange(x_BLD.shape[1])[None, :, None]
      delta_BLD = jnp.take_along_axis(delta_BCD, hit_BLC.argmax(-1)[..., None], axis=1)
      y_BLD = x_BLD + jnp.where(hit_BLC.any(-1)[..., None], delta_BLD, 0)
    count = lambda real: real.sum(dtype=jnp.float32)
    metrics = {"processed": (count(real_BC1), count(mask_BL))}
    return y_BLD, {"ffn": Routing(metrics=metrics)}, None


def _both(bias_HLM: jax.Array, place_BC: jax.Array) -> jax.Array:
  """The bias between the chosen positions of each row, bias_BHCC."""
  return bias_HLM[:, place_BC[:, :, None], place_BC[:, None, :]].swapaxes(0, 1)
