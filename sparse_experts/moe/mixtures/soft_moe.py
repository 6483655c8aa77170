"""Soft MoE: every expert computes weighted means of all tokens of a row; no token is assigned."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe import parallel
from sparse_experts.moe.arguments import check
from sparse_experts.moe.experts import Dropout, Experts
from sparse_experts.moe.mixtures.mixture import MixtureLayer, mixture_metrics
from sparse_experts.moe.routing import Pair


class SoftMoELayer(MixtureLayer):
  """Soft MoE: slots are mixtures of all tokens of a row, outputs are mixtures of all slots' outputs.

  logit_LEP = scale · x/|x| · Φ/|Φ|, both over width; slot (e, p) is the mean of the row's tokens with the
  weights softmax_L, a token's output the mean of all slots' outputs with softmax_EP. Puigcerver et al. 2023
  (Soft MoE), section 2.1. Each row of x is a group, as an image is in the paper; sequences packed into one
  row are mixed, and a causal decoder refuses this layer. Nothing is dropped, and there is no loss.

  slots: P, slots of each expert. The paper finds one slot and many experts best.

  The routing has no list; its load is the sum of an expert's weights in outputs, its entropy and
  confidence are of a token's weights summed over slots.
  """

  held_to = "two own numpy loops, by vmoe's code as read"
  dispatch = "soft"

  def __init__(self, d: int, experts: Experts, *, slots: int = 1, rngs: nnx.Rngs):
    check(slots >= 1, "router.slots", slots, "leaves an expert nothing to do; choose 1 or more")
    super().__init__(experts)
    self.slots = slots
    # Flax's axes, as in the paper's code: fan-in d E, so a slot's norm is 1 / sqrt(E). Logits do not see it,
    # Adam does: its relative steps are larger by sqrt(E) than from a norm of 1.
    phi = jax.nn.initializers.lecun_normal()
    self.phi = nnx.Param(phi(rngs.params(), (d, self.num_experts, slots)), axes=("embed", "router", None))
    self.scale = nnx.Param(jnp.ones(()), axes=())

  def rows_per_token(self, length: int) -> float:
    """Rows of experts computed per token of a row of `length`."""
    return self.num_experts * self.slots / length

  def router_flops(self, d: int, length: int) -> float:
    """FLOPs per token of the logits and of the two mixtures."""
    return 3 * 2 * d * self.num_experts * self.slots

  def mix(self, x_BLD: Array, mask_BL: Array, key: Array | None) -> tuple[Array, dict[str, Pair]]:
    B, L, D = x_BLD.shape
    E, P = self.num_experts, self.slots
    with jax.named_scope("router"):
      dispatch_BLEP, combine_BLEP = self.weights(x_BLD, mask_BL)
    seed_BEP = jnp.arange(B * E * P, dtype=jnp.uint32).reshape(B, E, P)

    def local(make_experts, by_group, key):
      x_BLD, dispatch_BLEP, combine_BLEP, seed_BEP = by_group
      rows = x_BLD.shape[0]
      with jax.named_scope("dispatch"):
        slot = jnp.einsum("blep,bld->ebpd", dispatch_BLEP, x_BLD).reshape(E, rows * P, D)
        dropout = None if key is None else Dropout(key, seed_BEP.swapaxes(0, 1).reshape(E, rows * P))
      y = make_experts(parallel.ExchangedExperts).batched(slot, dropout)
      with jax.named_scope("combine"):
        return jnp.einsum("blep,ebpd->bld", combine_BLEP, y.reshape(E, rows, P, -1))

    weights = dispatch_BLEP.astype(x_BLD.dtype), combine_BLEP.astype(x_BLD.dtype)
    key = key if self.experts.dropout else None
    y_BLD = parallel.shard_experts(local, (x_BLD, *weights, seed_BEP), self.experts, (key,))
    return y_BLD, mixture_metrics(combine_BLEP.sum(-1), mask_BL)

  def weights(self, x_BLD: Array, mask_BL: Array) -> tuple[Array, Array]:
    """(dispatch_BLEP, combine_BLEP), float32: one sums to 1 over real tokens, the other over slots."""
    unit = lambda a, axis: a * jax.lax.rsqrt((a * a).sum(axis, keepdims=True) + 1e-6)
    logit_BLEP = self.scale[...] * jnp.einsum(
        "bld,dep->blep", unit(x_BLD.astype(jnp.float32), -1), unit(self.phi[...], 0),
        precision=jax.lax.Precision.HIGHEST)
    real_BL11 = mask_BL[..., None, None]
    # A finite minimum: the softmax of a row of padding is a mean, not NaN, and is then set to zero.
    dispatch_BLEP = jax.nn.softmax(jnp.where(real_BL11, logit_BLEP, jnp.finfo(jnp.float32).min), axis=1)
    combine_BLEP = jax.nn.softmax(logit_BLEP, axis=(-2, -1))
    return jnp.where(real_BL11, dispatch_BLEP, 0.0), jnp.where(real_BL11, combine_BLEP, 0.0)
