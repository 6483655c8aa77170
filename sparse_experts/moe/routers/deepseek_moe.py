"""DeepSeekMoE's router: raw top-k with load-balancing losses over experts and over devices."""

from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check_divides
from sparse_experts.moe.routers.top_k import TopKRouter
from sparse_experts.moe.routing import Convention, Routing, count_experts, losses


class DeepSeekMoERouter(TopKRouter):
  """The k largest of softmax(x W), not renormalised, and two balance losses (Dai et al. 2024, DeepSeekMoE).

  The loss over devices is `losses.load_balance` with the sums of a device's probabilities and counts. Shared
  experts have no router and are not counted here.

  k: routed experts per token.
  devices: number of groups of consecutive experts, on any mesh; with 1 the loss over devices is the constant
    1.
  bias, scope: as for `TopKRouter`.
  load_balance_weight, device_balance_weight: the paper's alpha 1 and alpha 2; the values are ours.
  """

  held_to = "an own float64 loop, by the paper's equations"

  @classmethod
  def convention(cls, k: int) -> Convention:
    return Convention()

  def __init__(self, d: int, num_experts: int, k: int = 2, *, devices: int = 1, bias: bool = False,
               scope: str = "group", load_balance_weight: float = 1e-2,
               device_balance_weight: float = 1e-2, rngs: nnx.Rngs):
    check_divides("router.devices", devices, num_experts)
    super().__init__(d, num_experts, k, bias=bias, balance_count="assignments", scope=scope,
                     load_balance_weight=load_balance_weight, rngs=rngs)
    self.devices = devices
    self.loss_weights |= {"device_balance": device_balance_weight}

  def route(self, logit_GTE: Array, mask_GT: Array, *, capacity: int | None = None,
            key: Array | None = None) -> Routing:
    """The routing of `TopKRouter` with the loss over devices added."""
    routing = super().route(logit_GTE, mask_GT, capacity=capacity, key=key)
    by_device = lambda a: a.reshape(*a.shape[:-1], self.devices, -1).sum(-1)
    count_GE = count_experts(routing.expert, routing.valid, self.num_experts)
    balance = losses.load_balance(by_device(routing.prob), by_device(count_GE), mask_GT, self.scope)
    return routing.replace(losses=routing.losses | {"device_balance": balance})
