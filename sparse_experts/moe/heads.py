"""Multi-head MoE: a sparse layer that routes parts of tokens, sub-tokens, and merges what comes back."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.experts import Experts
from sparse_experts.moe.inputs import check_input
from sparse_experts.moe.layer import MoELayer
from sparse_experts.moe.routing import Router, Routing, Tokens

# Which of the two projections there are; the papers' ablation.
PROJECTIONS = ("both", "head", "merge", "none")


class Heads(nnx.Module):
  """The projections of MH-MoE: cut tokens into h sub-tokens, and join what the experts made of these.

  Sub-tokens are the h parts, of width d / h, of x w_head + b_head; router and experts have that width. The
  parts of the output side by side, times w_merge, plus b_merge, are the layer's output. A token's sub-tokens
  follow one another in its group; nothing is between the head projection and the router.
  Wu et al. 2024 (Multi-Head Mixture-of-Experts); Huang et al. 2024 (MH-MoE) for equal FLOPs and parameters.

  projections: `both`, or only `head` or `merge`, or `none`, for ablations. Weights: uniform, Xavier's with
  gain 1/sqrt(2) (head) and 1 (merge), as in the paper's code; biases start at 0, where that code leaves the
  head's to its framework.
  """

  def __init__(self, d: int, number: int, projections: str = "both", *, rngs: nnx.Rngs):
    check(number >= 1 and d % number == 0, "model.moe_heads", number,
          f"does not divide model.embed_dim={d}; choose a divisor")
    check_known("model.moe_projections", projections, PROJECTIONS)
    self.number, self.width = number, d // number

    def projection(variance: float, wanted: bool) -> tuple[Any, Any]:
      draw = jax.nn.initializers.variance_scaling(variance, "fan_avg", "uniform")
      w_DD, key = None, rngs.params()  # drawn in any case, so that one projection does not change the other
      if wanted:
        w_DD = nnx.Param(draw(key, (d, d), jnp.float32), axes=("embed", None))
      return w_DD, nnx.Param(jnp.zeros(d, jnp.float32), axes=("embed",)) if wanted else None

    self.w_head, self.b_head = projection(0.5, projections in ("both", "head"))
    self.w_merge, self.b_merge = projection(1.0, projections in ("both", "merge"))

  @jax.named_scope("heads")
  def split(self, x_BLD: Array) -> Array:
    """Tokens -> their sub-tokens, [B, L h, D / h]."""
    return self.cut(_affine(x_BLD, self.w_head, self.b_head))

  @jax.named_scope("merge")
  def merge(self, y_BSD: Array) -> Array:
    """Sub-tokens -> tokens [B, L, D]."""
    y_BLD = y_BSD.reshape(y_BSD.shape[0], -1, self.number * self.width)
    return _affine(y_BLD, self.w_merge, self.b_merge)

  def cut(self, x_BLD: Array) -> Array:
    """The parts of each vector, without the projection."""
    return x_BLD.reshape(x_BLD.shape[0], -1, self.width)

  def repeat(self, by_token: Any) -> Any:
    """Arrays [B, L] of tokens as arrays [B, L h] of sub-tokens: masks, ids, and what else a router reads."""
    return jax.tree.map(lambda a_BL: jnp.repeat(a_BL, self.number, axis=1), by_token)


def _affine(x_BLD: Array, w_DD: Any, b_D: Any) -> Array:
  if w_DD is None:
    return x_BLD
  return x_BLD @ w_DD[...].astype(x_BLD.dtype) + b_D[...].astype(x_BLD.dtype)[None, None]


class MultiHeadLayer(MoELayer):
  """`MoELayer` whose router and experts, of width D / h, take the sub-tokens of `heads` for tokens.

  Capacity, the routing's list, losses and metrics are of sub-tokens, as `capacity` and `rows_per_token` are.
  Only the argument `group_size` counts tokens; the attribute counts their sub-tokens. A token's mask, id,
  sequence, task and edits are its sub-tokens'. whole: shared experts, which see whole tokens, as `shared` of
  `MoELayer`.
  """

  def __init__(self, heads: Heads, router: Router, experts: Experts, dispatch: str = "ragged",
               group_size: int | None = None, *, shared: nnx.Module | None = None, **more: Any):
    size = None if group_size is None else group_size * heads.number
    super().__init__(router, experts, dispatch, size, **more)
    self.heads, self.num_heads, self.whole = heads, heads.number, shared

  def __call__(self, x_GTD: Array, tokens: Tokens | None = None, key: Array | None = None,
               edits: Any = None, stream_GTD: Array | None = None) -> tuple[Array, Routing]:
    B, L, tokens = check_input(x_GTD, tokens, self.experts, self.num_heads)
    real = lambda a_BLD: jnp.where(tokens.mask[..., None], a_BLD, 0)  # padding may hold NaN
    x_BSD = self.heads.split(x_GTD if self.router.reads_padding else real(x_GTD))
    stream_BSD = None if stream_GTD is None else self.heads.cut(stream_GTD)
    y_BSD, routing = super().__call__(x_BSD, self.heads.repeat(tokens), key, self.heads.repeat(edits),
                                      stream_BSD)
    y_BLD = real(self.heads.merge(y_BSD))
    if self.whole is not None:
      y_BLD += real(self.whole(real(x_GTD), None if key is None else jax.random.fold_in(key, 3)))
    if routing.log_prob is not None:  # for rewards, which are of tokens: of all choices of their parts
      of_token = lambda a_BS: a_BS.reshape(B, L, self.num_heads)
      routing = routing.replace(
          log_prob=of_token(routing.log_prob).sum(-1), value=of_token(routing.value).mean(-1))
    return y_BLD, routing
