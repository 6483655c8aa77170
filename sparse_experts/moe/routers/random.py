"""Random routing: experts are drawn uniformly."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.arguments import check_known
from sparse_experts.moe.routing import Router, Routing, Tokens, lists

DRAWS = ("layer", "token", "sequence")


class RandomRouter(Router):
  """Random routing: one expert, drawn uniformly; gate 1, no loss, nothing is learned.

  `draw` and `eval_draw` say what shares one expert: `layer` (all tokens of a pass through the layer),
  `token`, or `sequence`. By layer, the layer must be dropless: a capacity would drop most tokens.

  Defaults are the draws of the code of THOR (Zuo et al. 2021), which this is with `train.consistency`: that
  runs each batch through two such draws and adds the divergence between the two predictions. Without that
  loss, routing is only random.

  draw: used with a key; drawn again for every layer and pass.
  eval_draw: used without a key; drawn from a fixed key, the same for every layer (THOR's code draws anew at
    each call). By token, the expert depends on the token's position in the batch, by sequence on the
    sequence's number. Cached decoding has other positions, so it takes `layer` only.
  """

  held_to = "counts of own draws"

  def __init__(self, d: int, num_experts: int, *, draw: str = "layer", eval_draw: str = "token",
               rngs: nnx.Rngs):
    check_known("router.draw", draw, DRAWS)
    check_known("router.eval_draw", eval_draw, DRAWS)
    self.num_experts, self.draw, self.eval_draw = num_experts, draw, eval_draw
    self.causality = "self" if draw == eval_draw == "layer" else "past"
    self.drop_causality = "past"

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    draw, key = (self.eval_draw, jax.random.key(0)) if key is None else (self.draw, key)
    shape_GT = tokens.mask.shape
    if draw == "sequence":
      if tokens.sequence is None:
        raise UserError("router 'random' draws by sequence, but tokens.sequence is None; give the layer"
                        " Tokens(sequence=...) or draw by token")
      bits_GT = lists.scramble(tokens.sequence, jax.random.bits(key, (), jnp.uint32))
      expert_GT = (bits_GT % jnp.uint32(self.num_experts)).astype(jnp.int32)
    else:
      # On global shapes: the same on every mesh.
      drawn = jax.random.randint(key, shape_GT if draw == "token" else (1, 1), 0, self.num_experts, jnp.int32)
      expert_GT = jnp.broadcast_to(drawn, shape_GT)
    return lists.fixed(expert_GT[..., None], tokens.mask, self.num_experts)
