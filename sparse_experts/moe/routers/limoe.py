"""LIMoE's router: V-MoE's with entropy losses per modality, so that each modality uses enough experts."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.routers.v_moe import VMoERouter
from sparse_experts.moe.routing import Loss, Routing, Tokens, losses, scores


class LIMoERouter(VMoERouter):
  """`v_moe` with k = 1, batch priority, a z-loss, and two entropy losses per modality (Mustafa et al. 2022).

  A modality is a value of `tokens.task` from 0 to below the number of weights; other tokens enter no entropy
  loss. Without these losses a rare modality collapses onto one expert. The paper gives images a global loss
  and texts both; so do the defaults, with images as task 0. Ours are all weights, `min_experts`, and
  entropies of the noisy probabilities, which are those that choose. With batch priority, who gets a slot
  depends on later tokens: a causal decoder refuses it.

  k, noise, order, importance_weight, load_weight, load_balance_weight: as for `v_moe`.
  z_weight: coefficient of the z-loss.
  local_weights, global_weights: coefficients of each modality's `local_entropy` and `global_entropy`.
  min_experts: the paper's S_min, for all modalities; None: half of the experts.
  scope: over what a `global_entropy` is computed: `batch` as the paper, or each `group`. Importance and load
    are per group, as V-MoE's.
  """

  held_to = "cases by hand, by the paper's formulas"

  def __init__(self, d: int, num_experts: int, k: int = 1, *, noise: float = 1.0,
               order: str = "batch_priority", importance_weight: float = 5e-3, load_weight: float = 5e-3,
               load_balance_weight: float = 0.0, z_weight: float = 1e-3,
               local_weights: Sequence[float] = (0.0, 1e-2),
               global_weights: Sequence[float] = (1e-2, 1e-2), min_experts: float | None = None,
               scope: str = "batch", rngs: nnx.Rngs):
    super().__init__(d, num_experts, k, noise=noise, order=order, importance_weight=importance_weight,
                     load_weight=load_weight, load_balance_weight=load_balance_weight, rngs=rngs)
    if len(local_weights) != len(global_weights):
      raise UserError(f"router.local_weights names {len(local_weights)} modalities, router.global_weights "
                      f"{len(global_weights)}; give each a weight in both, 0 for none")
    min_experts = max(num_experts / 2, 1) if min_experts is None else min_experts
    check(1 <= min_experts <= num_experts, "router.min_experts", min_experts,
          f"is not between 1 and num_experts={num_experts}")
    check_known("router.scope", scope, losses.SCOPES)
    self.min_experts, self.modalities, self.global_scope = min_experts, len(local_weights), scope
    both = {"local_entropy": local_weights, "global_entropy": global_weights}
    self.loss_weights |= {"z": z_weight} | {
        f"{name}_{m}": weight for name, weights in both.items() for m, weight in enumerate(weights)}

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    if tokens.task is None:
      raise UserError("router 'limoe' needs tokens.task, the modality, which is None; give batches a"
                      " 'domain', or the layer Tokens(task=...)")
    routing = super().__call__(x_GTD, tokens, capacity, key)
    entropies: dict[str, Loss] = {}
    for m in range(self.modalities):
      mask_GT = tokens.mask & (tokens.task == m)
      entropies[f"local_entropy_{m}"] = local_entropy(routing.prob, mask_GT)
      entropies[f"global_entropy_{m}"] = global_entropy(
          routing.prob, mask_GT, self.min_experts, self.global_scope)
    return routing.replace(losses=routing.losses | entropies)

  def route(self, logit_GTE: Array, mask_GT: Array, noise_GTE: Array | None = None) -> Routing:
    """The routing of `v_moe` with the z-loss added."""
    routing = super().route(logit_GTE, mask_GT, noise_GTE)
    return routing.replace(losses=routing.losses | {"z": losses.z(logit_GTE, mask_GT)})


def local_entropy(prob_GTE: Array, mask_GT: Array) -> Loss:
  """Mean over tokens of H(p) = -Σ_e p_e log p_e, per group: low when each token is sure."""
  return losses.average(scores.entropy(prob_GTE), mask_GT)


def global_entropy(prob_GTE: Array, mask_GT: Array, min_experts: float, scope: str) -> Loss:
  """max(0, log min_experts - H(mean over tokens of p)): 0 when tokens share as many experts."""
  return losses.scoped(scope, _Lack(min_experts), losses.sum_over_tokens(prob_GTE, mask_GT), mask_GT)


@dataclasses.dataclass(frozen=True)
class _Lack:
  min_experts: float

  def __call__(self, prob_E: Array, tokens: Array) -> Array:
    return jax.nn.relu(math.log(self.min_experts) - scores.entropy(losses.mean(prob_E, tokens)))
