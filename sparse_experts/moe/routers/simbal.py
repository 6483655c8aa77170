"""SimBal: the router's matrix is kept near orthonormal, so that similar tokens get similar scores."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check_known
from sparse_experts.moe.routers.top_k import TopKRouter
from sparse_experts.moe.routing import Convention, Routing, Tokens

GATES = ("raw", "renormalized")


class SimBalRouter(TopKRouter):
  """Top-k of softmax(x W) with the loss Σ_ij |(Wᵀ W - I)_ij| in place of load balancing (Omi et al. 2025).

  W starts orthonormal, where the loss is 0, if E is at most d. The loss reads the weights alone: no counts,
  no state, the same number on every device and for any batch. Near its optimum each entry's gradient jumps
  between -1 and 1, so with Adam the router jitters; and weight decay works against it, as columns want norm
  1. Evaluation has nothing special. Losses of layers add up. Nothing is dropped.

  k, jitter, order: as for `TopKRouter`.
  gate: `raw` or `renormalized`, as there.
  orthogonality_weight: coefficient of the loss. The paper's was not found; this is Switch's of its own loss.
  z_weight: coefficient of the z-loss.
  """

  held_to = "two own scripts, by the paper's formula"

  @classmethod
  def convention(cls, k: int) -> Convention:
    return Convention()

  def __init__(self, d: int, num_experts: int, k: int = 2, *, jitter: float = 0.0, gate: str = "raw",
               order: str = "choice", orthogonality_weight: float = 1e-2, z_weight: float = 0.0,
               rngs: nnx.Rngs):
    check_known("router.gate", gate, GATES)
    super().__init__(d, num_experts, k, jitter=jitter, gate=gate, order=order, rngs=rngs)
    self.loss_weights = {"orthogonality": orthogonality_weight, "z": z_weight}
    first_DE = jax.nn.initializers.orthogonal()(rngs.params(), (d, num_experts))
    self.w = nnx.Param(first_DE, axes=("embed", "router"))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    routing = super().__call__(x_GTD, tokens, capacity, key)
    # One number, counted once per group with real tokens, so that parts of a batch average to it.
    groups = tokens.mask.any(-1).sum(dtype=jnp.float32)
    return routing.replace(losses={
        "orthogonality": (orthogonality(self.w[...]) * groups, groups), "z": routing.losses["z"]})


def orthogonality(w_DE: Array) -> Array:
  """Σ_ij |(Wᵀ W - I)_ij| over pairs of experts; 0 when columns are orthonormal."""
  gram_EE = jnp.einsum("de,df->ef", w_DE, w_DE, precision=jax.lax.Precision.HIGHEST)
  return jnp.abs(gram_EE - jnp.eye(w_DE.shape[1])).sum()
