"""No-Token-Left-Behind: a token without a slot asks its next-best expert, stage by stage."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check
from sparse_experts.moe.routers.top_k import TopKRouter
from sparse_experts.moe.routing import Routing, count_experts, lists, losses, scores, slots


class NoTokenLeftBehindRouter(TopKRouter):
  """Switch's top-1 in stages: in stage i, tokens without a slot ask for their i-th best expert.

  Fedus et al. 2021, appendix, who found no gain; as in Mesh's code. A token asks for that expert whether or
  not it is full; in a stage tokens ask in list order, and slots go on from the stages before. The gate is the
  probability of the expert that took the token; a token that K experts refused is dropped. The balance loss
  counts all K choices of every token, asked or not, before capacity: it is Switch's, averaged over ranks, and
  always 1, without a gradient, if K = E. The load counts where tokens went.

  Dropless, nothing overflows, and this is `top_k` with that balance loss. In a causal decoder with a
  capacity, a token's expert may depend on later tokens, as drops of second choices do.

  Dispatches keep exactly the assignments kept here, in the same list order: a token that left a full expert
  came after those that filled it, and an expert with room never gets more tokens than it holds.

  choices: K, the first choice included; at most all E. 4 is Mesh's.
  jitter, bias, scope, load_balance_weight, z_weight: as for `TopKRouter`.
  """

  held_to = "two own scripts, by Mesh's code as read"

  def __init__(self, d: int, num_experts: int, *, choices: int = 4, jitter: float = 0.0, bias: bool = False,
               scope: str = "group", load_balance_weight: float = 1e-2, z_weight: float = 0.0,
               rngs: nnx.Rngs):
    check(choices >= 1, "router.choices", choices, "asks no expert; choose 1 or more")
    super().__init__(d, num_experts, jitter=jitter, bias=bias, scope=scope,
                     load_balance_weight=load_balance_weight, z_weight=z_weight, rngs=rngs)
    self.choices = min(choices, num_experts)
    self.drop_causality = "batch"  # later tokens' first choices may fill the expert that a token asks next

  def route(self, logit_GTE: Array, mask_GT: Array, *, capacity: int | None = None,
            key: Array | None = None) -> Routing:
    """The routing of given logits under `capacity`."""
    prob_GTE = scores.softmax(logit_GTE)
    expert_GTK, gate_GTK = scores.top_k(prob_GTE, self.choices)
    G, T, K = expert_GTK.shape
    counted_GA = jnp.broadcast_to(mask_GT[..., None], (G, T, K)).reshape(G, T * K)
    count_GE = count_experts(expert_GTK.reshape(G, T * K), counted_GA, self.num_experts)
    stage_GT1 = jnp.zeros((G, T, 1), jnp.int32)
    if capacity is not None:
      stage_GT1 = self._stages(expert_GTK, mask_GT, capacity)[..., None]
    at_stage = lambda a_GTK: jnp.take_along_axis(a_GTK, stage_GT1, axis=-1)
    return lists.token_choice(at_stage(expert_GTK), at_stage(gate_GTK), prob_GTE, mask_GT, losses={
        "load_balance": losses.load_balance(prob_GTE, count_GE, mask_GT, self.scope),
        "z": losses.z(logit_GTE, mask_GT, self.scope)})

  def _stages(self, expert_GTK: Array, mask_GT: Array, capacity: int) -> Array:
    """The stage in which each token gets its slot, int32 _GT; 0 for a token that gets none."""
    E = self.num_experts
    stage_GT, waits_GT = jnp.zeros(mask_GT.shape, jnp.int32), mask_GT
    used_GE = jnp.zeros((mask_GT.shape[0], E), jnp.int32)
    for i in range(self.choices):
      asked_GT = expert_GTK[..., i]
      slot_GT = jnp.take_along_axis(used_GE, asked_GT, axis=-1) + slots(asked_GT, waits_GT, E)
      fits_GT = waits_GT & (slot_GT < capacity)
      used_GE += count_experts(asked_GT, fits_GT, E)
      stage_GT, waits_GT = jnp.where(fits_GT, i, stage_GT), waits_GT & ~fits_GT
    return stage_GT
