"""SMEAR: the experts' weights are averaged for each row, and one merged expert works on all its tokens."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check
from sparse_experts.moe.experts import Experts, get_activation
from sparse_experts.moe.mixtures.mixture import MixtureLayer, mixture_metrics
from sparse_experts.moe.routing import Pair

EPSILON = 1e-5  # of the two layer norms


class SmearLayer(MixtureLayer):
  """SMEAR: a row's tokens pass one expert of weights Σ_e p_e θ_e, p a softmax of the row's mean.

  p = softmax(norm(v) norm(R) + b), v the mean of the row's real tokens. R and its norm's gain start small
  (0.01), so p starts nearly even. While training each p_e is zeroed with probability `expert_dropout`, and
  the rest divided by its sum. Muqeeth et al. 2023 (SMEAR), section 3, whose experts are adapters; here they
  are `Experts`. A row is one example: sequences packed into one row share a merged expert, and a causal
  decoder refuses this layer. A norm(v) without weights is ours. Gradients are exact and nothing is dropped;
  merging costs E / L FFNs per token.

  On a mesh the compiler places the arrays. Rows are sharded over `expert`, too, so each device merges all
  experts for its rows: XLA gathers their weights there, which no other layer does. A device holds E experts,
  and one merged expert per row.

  The routing has no list; load, entropy and confidence are of the rows' p.
  """

  held_to = "a row by hand, by the paper's formula"
  dispatch = "merged"

  def __init__(self, d: int, experts: Experts, *, expert_dropout: float = 0.1, rngs: nnx.Rngs):
    check(0 <= expert_dropout < 1, "router.expert_dropout", expert_dropout,
          "is out of range; choose from 0 to below 1")
    check(not experts.dropout, "model.expert_dropout", experts.dropout, "drops hidden units of single "
          "experts, which 'smear' merges; set it to 0 and use model.router.expert_dropout")
    super().__init__(experts)
    self.expert_dropout = expert_dropout
    self.w = nnx.Param(
        0.01 * jax.random.normal(rngs.params(), (d, self.num_experts)), axes=("embed", "router"))
    self.gain = nnx.Param(jnp.full((d, 1), 0.01), axes=("embed", "router"))
    self.b = nnx.Param(jnp.zeros(self.num_experts), axes=("router",))

  def rows_per_token(self, length: int) -> float:
    """FFNs per token of a row of `length`: one merged, and E / length for merging."""
    return 1 + self.num_experts / length

  def router_flops(self, d: int, length: int) -> float:
    """FLOPs per token of the logits, which are computed once per row."""
    return 2 * d * self.num_experts / length

  def mix(self, x_BLD: Array, mask_BL: Array, key: Array | None) -> tuple[Array, dict[str, Pair]]:
    with jax.named_scope("router"):
      prob_BE = self.probabilities(x_BLD, mask_BL)
      weight_BE = prob_BE if key is None else self.drop(prob_BE, key)
    return self.merged(x_BLD, weight_BE), mixture_metrics(prob_BE, mask_BL.any(-1))

  def probabilities(self, x_BLD: Array, mask_BL: Array) -> Array:
    """p_BE in float32, of x that is zero where masked."""
    count_B1 = jnp.maximum(mask_BL.sum(-1, keepdims=True, dtype=jnp.float32), 1.0)
    v_BD = x_BLD.astype(jnp.float32).sum(1) / count_B1
    logit_BE = jnp.einsum("bd,de->be", _norm(v_BD, -1), _norm(self.w[...], 0) * self.gain[...],
                          precision=jax.lax.Precision.HIGHEST)
    return jax.nn.softmax(logit_BE + self.b[...][None], axis=-1)

  def drop(self, prob_BE: Array, key: Array) -> Array:
    """Zeroes each expert of each row with probability `expert_dropout`; if all are, all weigh the same."""
    stays_BE = jax.random.bernoulli(key, 1 - self.expert_dropout, prob_BE.shape)
    left_BE = jnp.where(stays_BE, prob_BE, 0.0) + 1e-10
    return left_BE / left_BE.sum(-1, keepdims=True)

  @jax.named_scope("experts")
  def merged(self, x_BLD: Array, weight_BE: Array) -> Array:
    """Output of each row's merged expert."""
    function, gated = get_activation(self.experts.activation)

    def product(a_BLD, w_EDF):
      w_BDF = jnp.einsum("be,edf->bdf", weight_BE, w_EDF[...]).astype(a_BLD.dtype)
      return jnp.einsum("bld,bdf->blf", a_BLD, w_BDF)

    h_BLF = product(x_BLD, self.experts.w_in)
    h_BLF = function(product(x_BLD, self.experts.w_gate)) * h_BLF if gated else function(h_BLF)
    if self.experts.scale is not None:
      scale_BF = jnp.einsum("be,ef->bf", weight_BE, self.experts.scale[...])
      h_BLF *= scale_BF[:, None].astype(h_BLF.dtype)
    return product(h_BLF, self.experts.w_out)


def _norm(a: Array, axis: int) -> Array:
  a = a - a.mean(axis, keepdims=True)
  return a * jax.lax.rsqrt((a * a).mean(axis, keepdims=True) + EPSILON)
