"""Expert threshold: a token goes to every expert whose cut its logit passes; cuts are averaged quantiles."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check
from sparse_experts.moe.routing import Pair, Router, Routing, Tokens, lists, scores


class ExpertThresholdRouter(Router):
  """All experts with logit >= cut, with raw gate sigmoid(logit) (Sun et al. 2026).

  An expert's cut is a moving average of κ, the logit of its k'-th best token, k' = tokens / E: so it gets an
  even share on average, a token any number of experts or none, and the choice needs no other token. The
  average is corrected for its start at 0. κ is taken in each routing group, of its real tokens, and averaged
  over groups (the authors' over micro-batches; in their code over devices only after the warm-up), so it
  depends on the group size and on no mesh. Gates are not normalised, and there is no loss. The paper has a
  shared expert beside them, `model.shared_experts=1`, which its code takes into k'; here k' is of the E
  others.

  Two things are of training only and look at the whole group. In the first `warmup_steps` each expert takes
  its k' best tokens (expert choice) while cuts are estimated. And an expert takes at least int(k' (1 -
  slack)) and at most int(k' (1 + slack)) tokens, by logit: one with few is filled, one with many is cut. With
  either, a causal decoder refuses this router. It takes it with warmup_steps=0 and a slack of E or more, but
  then the first step, whose cuts are 0, sends each token to about half of the experts. Evaluation goes by the
  cuts alone, from the start.

  Dropless beyond these bounds; capacity rules count one expert per token, FLOPs all E, and the list holds
  every token with every expert.

  decay: of the average, the paper's 0.999; the code's default is 0.99.
  warmup_steps: the paper's 4000, of about 19,000.
  slack: the paper's 0.5, in the code off by default; E or more: no bounds.
  """

  held_to = "choices and cuts of the authors' code, run"

  def __init__(self, d: int, num_experts: int, *, decay: float = 0.999, warmup_steps: int = 4000,
               slack: float = 0.5, rngs: nnx.Rngs):
    check(0 <= decay < 1, "router.decay", decay, "is out of range; choose from 0 to below 1")
    check(warmup_steps >= 0, "router.warmup_steps", warmup_steps, "is negative; choose 0 or more")
    check(slack >= 0, "router.slack", slack, f"is negative; choose 0 or more, {num_experts} for no bounds")
    self.num_experts = self.most_experts = num_experts
    self.decay, self.warmup_steps, self.slack = decay, warmup_steps, slack
    self.causality = "batch" if warmup_steps or slack < num_experts else "self"
    self.w = nnx.Param(jax.random.normal(rngs.params(), (d, num_experts)) / math.sqrt(d),
                       axes=("embed", "router"))
    self.cut_E = nnx.Variable(jnp.zeros(num_experts))
    self.steps = nnx.Variable(jnp.zeros((), jnp.int32))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    return self.route(scores.linear(x_GTD, self.w[...]), tokens.mask, training=key is not None)

  def route(self, logit_GTE: Array, mask_GT: Array, *, training: bool) -> Routing:
    """The routing of given logits."""
    fixed_GTE = jnp.where(mask_GT[..., None], jax.lax.stop_gradient(logit_GTE), -jnp.inf)
    order_GTE = jnp.argsort(-fixed_GTE, axis=1, stable=True)
    tokens_G = mask_GT.sum(-1, dtype=jnp.int32)
    share_G = jnp.maximum(tokens_G // self.num_experts, 1)
    chosen_GTE = fixed_GTE >= self.cut_E[...][None, None]
    if training:
      rank_GTE = jnp.argsort(order_GTE, axis=1, stable=True)
      chosen_GTE = self._while_training(chosen_GTE, rank_GTE, share_G[:, None, None])
    chosen_GTE &= mask_GT[..., None]

    gate_GTE = jax.nn.sigmoid(logit_GTE)
    prob_GTE = gate_GTE / (gate_GTE.sum(-1, keepdims=True) + 1e-20)
    expert_GTE, gate_GTE, valid_GTE = lists.every_expert(gate_GTE, mask_GT)
    valid_GTE &= jnp.take_along_axis(chosen_GTE, expert_GTE, axis=-1)
    routing = lists.token_choice(expert_GTE, gate_GTE, prob_GTE, mask_GT, valid_GTK=valid_GTE,
                                 expected_fraction=self.k / self.num_experts)
    last_G1E = jnp.take_along_axis(order_GTE, share_G[:, None, None] - 1, axis=1)
    kappa_GE, real_G = jnp.take_along_axis(fixed_GTE, last_G1E, axis=1)[:, 0], tokens_G > 0
    return routing.replace(stats={"kappa": jnp.where(real_G[:, None], kappa_GE, 0.0).sum(0),
                                  "groups": real_G.sum(dtype=jnp.float32)})

  def _while_training(self, above_GTE: Array, rank_GTE: Array, share_G11: Array) -> Array:
    """Who goes where, by experts' ranks of tokens: expert choice at first, then cuts within bounds."""
    if self.slack < self.num_experts:
      # 1e-4: int(10 * 0.7) is 7, whatever float32 makes of it.
      bound = lambda factor: jnp.floor(share_G11.astype(jnp.float32) * factor + 1e-4).astype(jnp.int32)
      least_G11, most_G11 = bound(1 - self.slack), bound(1 + self.slack)
      above_GTE = (above_GTE & (rank_GTE < most_G11)) | (rank_GTE < least_G11)
    if not self.warmup_steps:
      return above_GTE
    return jnp.where(self.steps[...] < self.warmup_steps, rank_GTE < share_G11, above_GTE)

  def next_state(self, state: Any, params: Any, metrics: dict[str, Pair], stats: dict[str, Array]) -> Any:
    """The cuts with this step's κ; of a step without tokens, the old ones."""
    seen, steps = stats["groups"] > 0, state["steps"] + 1
    kappa_E = stats["kappa"] / jnp.maximum(stats["groups"], 1.0)
    # (1 - decay) / (1 - decay^steps), the weight that the bias-corrected average gives to its newest value.
    whole = -jnp.expm1(steps.astype(jnp.float32) * math.log(max(self.decay, 1e-30)))
    weight = jnp.where(steps == 1, 1.0, (1 - self.decay) / whole)  # at first exactly
    cut_E = state["cut_E"] + weight * (kappa_E - state["cut_E"])
    new = {"cut_E": cut_E, "steps": steps}
    return {**state, **{name: jnp.where(seen, a, state[name]) for name, a in new.items()}}
