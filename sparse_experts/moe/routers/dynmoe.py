"""DynMoE: a token takes every expert above the expert's threshold; the pool of experts grows and shrinks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.routing import Pair, Router, Routing, Tokens, lists, scores

MAX_SCALE = 100.0
COUNT_GRADIENTS = ("held", "through")


class DynMoERouter(Router):
  """All experts with sigmoid(c cos(x, w_e)) > sigmoid(c threshold_e), with gate 1 / K (Guo et al. 2025).

  K is the number of a token's active experts; E is the size of the pool, whose experts are enabled or not.
  While training, a token without active experts is sent nowhere; in evaluation (without a key) it goes to its
  best enabled expert with gate 1. The gradient of an active expert's 0-or-1 weight is that of sigmoid -
  sigmoid. The authors drop nothing; under capacity, whose rules count one expert per token and all E experts
  (as do FLOPs), a token's best experts claim slots first. The list holds every token with every expert, so
  moving rows takes the memory of k = E.

  In each period of `update_every` optimizer steps, the steps from one half to three quarters record which
  experts were active, and the sum of the vectors of tokens without one. After them experts that were never
  active are disabled and, if that sum is not zero, the first disabled expert is enabled, with the sum's
  direction and threshold 0; if nothing was recorded the pool stays. Parameters cannot be set there:
  `w_offset` and `threshold_offset` are added to them, and weight decay does not act on those. The enabled
  expert keeps its FFN and the optimizer's moments: for a disabled expert they decay to those of the
  simplicity loss.

  initial_experts: how many experts are enabled first; None: all.
  update_every: steps of a period, an epoch in the authors' script for text; 0: the pool stays. Their vision
    code renews the pool after every step, which is not here.
  scale: initial c. train_scale: whether c is learned, up to 100. Every script of the authors has 1, fixed;
    their `gated_multi_gate_t` starts at 10 and learns it.
  count_gradient: `through`: the division by K has a gradient, as in the authors' Tutel, so a token with one
    active expert does not teach its gate. There K divides only if some token of the batch, here of the group,
    has two experts, else it is held. `held`: it has none, as in their DeepSpeed, where K is an integer and
    two more losses keep it small: without them tokens may end with all experts.
  diversity_weight, simplicity_weight: coefficients of the two losses below, the authors' 0.01 for both. The
    balance and mean-gate losses that their DeepSpeed adds are left out.
  """

  held_to = "cases by hand, by the authors' two codes as read"
  causality = "self"

  def __init__(self, d: int, num_experts: int, *, initial_experts: int | None = None, update_every: int = 100,
               scale: float = 1.0, train_scale: bool = False, count_gradient: str = "through",
               diversity_weight: float = 1e-2, simplicity_weight: float = 1e-2, rngs: nnx.Rngs):
    initial_experts = num_experts if initial_experts is None else initial_experts
    check(1 <= initial_experts <= num_experts, "router.initial_experts", initial_experts,
          f"is not between 1 and num_experts={num_experts}")
    check(update_every == 0 or update_every >= 4, "router.update_every", update_every,
          "leaves no step to record in; choose 4 or more, or 0 for a pool that stays")
    check(0 < scale <= MAX_SCALE, "router.scale", scale,
          f"is out of range; choose from above 0 to {MAX_SCALE:g}")
    self.num_experts = self.most_experts = num_experts
    check_known("router.count_gradient", count_gradient, COUNT_GRADIENTS)
    self.update_every, self.count_gradient = update_every, count_gradient
    self.loss_weights = {"diversity": diversity_weight, "simplicity": simplicity_weight}
    self.w = nnx.Param(
        jax.nn.initializers.orthogonal()(rngs.params(), (d, num_experts)), axes=("embed", "router"))
    self.threshold = nnx.Param(jnp.zeros(num_experts), axes=("router",))
    log_scale = jnp.asarray(math.log(scale))
    self.log_scale = nnx.Param(log_scale, axes=()) if train_scale else nnx.Variable(log_scale)
    self.enabled_E = nnx.Variable(jnp.arange(num_experts) < initial_experts)
    self.w_offset_DE = nnx.Variable(jnp.zeros((d, num_experts)))
    self.threshold_offset_E = nnx.Variable(jnp.zeros(num_experts))
    self.active_E = nnx.Variable(jnp.zeros(num_experts))  # recorded assignments
    self.unrouted_D = nnx.Variable(jnp.zeros(d))  # recorded sum of tokens without an active expert
    self.steps = nnx.Variable(jnp.zeros((), jnp.int32))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    x_GTD, w_DE = x_GTD.astype(jnp.float32), self.w[...] + self.w_offset_DE[...]
    cosine_GTE = scores.linear(scores.unit(x_GTD, -1), scores.unit(w_DE, 0))
    routing, alone_GT = self.route(cosine_GTE, tokens.mask, training=key is not None)
    groups = tokens.mask.any(-1).sum(dtype=jnp.float32)
    of_weights = {"diversity": diversity(w_DE, self.enabled_E[...]), "simplicity": simplicity(w_DE)}
    return routing.replace(
        losses={name: (value * groups, groups) for name, value in of_weights.items()},
        metrics=routing.metrics | {"enabled": (self.enabled_E[...].sum(dtype=jnp.float32) * groups, groups)},
        stats={"unrouted": jnp.where(alone_GT[..., None], x_GTD, 0.0).sum((0, 1))})

  def route(self, cosine_GTE: Array, mask_GT: Array, *, training: bool) -> tuple[Routing, Array]:
    """The routing of given cosines, without losses, and which tokens have no active expert, bool _GT."""
    E, enabled_11E = self.num_experts, self.enabled_E[...][None, None]
    scale = jnp.exp(jnp.minimum(self.log_scale[...], math.log(MAX_SCALE)))
    bar_E = jax.nn.sigmoid(scale * (self.threshold[...] + self.threshold_offset_E[...]))
    score_GTE = jnp.where(enabled_11E, jax.nn.sigmoid(scale * cosine_GTE), 0.0)
    above_GTE = score_GTE - bar_E[None, None]
    active_GTE = (above_GTE > 0) & mask_GT[..., None]
    # Straight-through: the value is 0 or 1, the gradient that of the score above the threshold.
    above_GTE = jnp.where(active_GTE, above_GTE, 0.0)
    one_GTE = active_GTE.astype(jnp.float32) + (above_GTE - jax.lax.stop_gradient(above_GTE))
    count_GT1 = one_GTE.sum(-1, keepdims=True)
    count_GT1 = jnp.where(count_GT1 > 0, count_GT1, 1.0)  # `maximum` would halve the gradient of a count of 1
    held_GT1 = jax.lax.stop_gradient(count_GT1)
    if self.count_gradient == "through":
      shared_G11 = (active_GTE.sum(-1, keepdims=True) > 1).any(1, keepdims=True)
      held_GT1 = jnp.where(shared_G11, count_GT1, held_GT1)
    gate_GTE = one_GTE / held_GT1

    fixed_GTE = jax.lax.stop_gradient(jnp.where(enabled_11E, score_GTE, -1.0))
    alone_GT = mask_GT & ~active_GTE.any(-1)
    if not training:
      best_GTE = jax.nn.one_hot(fixed_GTE.argmax(-1), E, dtype=bool) & alone_GT[..., None]
      gate_GTE, active_GTE = jnp.where(best_GTE, 1.0, gate_GTE), active_GTE | best_GTE
    expert_GTE = jnp.argsort(-fixed_GTE, axis=-1, stable=True).astype(jnp.int32)
    gate_GTE, active_GTE = (jnp.take_along_axis(a, expert_GTE, axis=-1) for a in (gate_GTE, active_GTE))
    prob_GTE = score_GTE / jnp.maximum(score_GTE.sum(-1, keepdims=True), 1e-20)
    return lists.token_choice(
        expert_GTE, gate_GTE, prob_GTE, mask_GT, valid_GTK=active_GTE, expected_fraction=self.k / E), alone_GT

  def next_state(self, state: Any, params: Any, metrics: dict[str, Pair], stats: dict[str, Array]) -> Any:
    if not self.update_every:
      return state
    begins, ends = self.update_every // 2, 3 * self.update_every // 4
    step = state["steps"] % self.update_every
    records = (step >= begins) & (step < ends)
    add = lambda old, new: jnp.where(records, jnp.where(step == begins, 0.0, old) + new, old)
    state = {**state, "steps": state["steps"] + 1, "active_E": add(state["active_E"], metrics["load"][0]),
             "unrouted_D": add(state["unrouted_D"], stats["unrouted"])}
    return jax.tree.map(lambda new, old: jnp.where(step == ends - 1, new, old), _renew(state, params), state)


def _renew(state: Any, params: Any) -> Any:
  """The state with experts disabled and enabled by the record."""
  norm = jnp.sqrt((state["unrouted_D"] ** 2).sum())
  used_E = state["enabled_E"] & (state["active_E"] > 0)
  enabled_E = jnp.where(used_E.any() | (norm > 0), used_E, state["enabled_E"])
  first_E = jax.nn.one_hot(jnp.argmin(enabled_E), enabled_E.shape[0], dtype=bool)
  new_E = first_E & ~enabled_E & (norm > 0)
  direction_D1 = (state["unrouted_D"] / jnp.where(norm > 0, norm, 1.0))[:, None]
  return {**state, "enabled_E": enabled_E | new_E,
          "w_offset_DE": jnp.where(new_E[None], direction_D1 - params["w"], state["w_offset_DE"]),
          "threshold_offset_E": jnp.where(new_E, -params["threshold"], state["threshold_offset_E"])}


def diversity(w_DE: Array, enabled_E: Array) -> Array:
  """Frobenius norm of (Ŵᵀ Ŵ - I) between enabled experts, Ŵ the normalised columns: 0 when orthogonal."""
  unit_DE = scores.unit(w_DE, 0)
  gram_EE = jnp.einsum("de,df->ef", unit_DE, unit_DE, precision=jax.lax.Precision.HIGHEST)
  both_EE = enabled_E[:, None] & enabled_E[None]
  return _root(jnp.where(both_EE, gram_EE - jnp.eye(w_DE.shape[1]), 0.0) ** 2, None)


def simplicity(w_DE: Array) -> Array:
  """Mean norm of the columns, of disabled experts too."""
  return _root(w_DE**2, 0).mean()


def _root(square: Array, axis: int | None) -> Array:
  return jnp.sqrt(square.sum(axis) + 1e-12)  # where all is zero, the root alone has no gradient
