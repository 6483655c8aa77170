"""No-Token-Left-Behind: a token whose expert is full goes to its next-best expert that has room."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check
from sparse_experts.moe.routers.top_k import TopKRouter
from sparse_experts.moe.routing import Routing, count_experts, router_metrics, slots


class NoTokenLeftBehindRouter(TopKRouter):
  """Switch's top-1, then rounds that reroute tokens without a slot (Fedus et al. 2021, who found no gain).

  In a round each token without a slot asks its most probable expert among those with room; experts accept
  tokens in list order while room lasts. A token keeps its position in the list, and its gate is its
  probability of the expert it went to. The balance loss counts first choices; the load counts where tokens
  went. Dropless, nothing overflows, and this is `top_k`. In a causal decoder with a capacity, a token's
  expert may depend on later tokens, as drops of second choices do.

  Dispatches keep exactly the assignments kept here, in the same list order: a token that left a full expert
  came after those that filled it, and an expert with room never gets more tokens than it holds.

  rounds: number of rounds; Mesh has 4.
  jitter, load_balance_weight, z_weight: as for `TopKRouter`.
  """

  def __init__(self, d: int, num_experts: int, *, rounds: int = 4, jitter: float = 0.0,
               load_balance_weight: float = 1e-2, z_weight: float = 0.0, rngs: nnx.Rngs):
    check(rounds >= 1, "router.rounds", rounds, "reroutes nothing; choose 1 or more, or router.name='top_k'")
    super().__init__(d, num_experts, jitter=jitter, load_balance_weight=load_balance_weight,
                     z_weight=z_weight, rngs=rngs)
    self.rounds = rounds
    self.drop_causality = "batch"  # later first choices may fill the expert to which a token is rerouted

  def route(self, logit_GTE: Array, mask_GT: Array, *, capacity: int | None = None,
            key: Array | None = None) -> Routing:
    """The routing of given logits under `capacity`."""
    routing = super().route(logit_GTE, mask_GT, key=key)
    if capacity is None:
      return routing
    # With one choice the list is the tokens in order.
    fixed_GTE = jax.lax.stop_gradient(routing.prob)
    expert_GT = self._send_on(fixed_GTE, routing.expert, mask_GT, capacity)
    gate_GT = jnp.take_along_axis(routing.prob, expert_GT[..., None], axis=-1)[..., 0]
    return routing.replace(expert=expert_GT, gate=gate_GT, metrics=router_metrics(
        expert_GT, mask_GT, routing.prob, mask_GT, self.num_experts))

  def _send_on(self, prob_GTE: Array, expert_GT: Array, mask_GT: Array, capacity: int) -> Array:
    E = self.num_experts
    kept_GT = mask_GT & (slots(expert_GT, mask_GT, E) < capacity)
    for _ in range(self.rounds):
      room_GE = capacity - count_experts(expert_GT, kept_GT, E)
      wish_GT = jnp.where(room_GE[:, None] > 0, prob_GTE, -1.0).argmax(-1).astype(jnp.int32)
      asks_GT = mask_GT & ~kept_GT
      fits_GT = asks_GT & (slots(wish_GT, asks_GT, E) < jnp.take_along_axis(room_GE, wish_GT, axis=-1))
      expert_GT, kept_GT = jnp.where(fits_GT, wish_GT, expert_GT), kept_GT | fits_GT
    return expert_GT
