"""DeepSeek-V3's router: sigmoid scores, balanced by a bias without gradient, few nodes per token."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_k
from sparse_experts.moe.routing import Pair, Router, Routing, Tokens, lists, losses, scores


class DeepSeekV3Router(Router):
  """The k largest of sigmoid(x W) + bias; gates are scores without bias (DeepSeek-AI 2024, section 2.1.2).

  After each optimizer step an expert's bias rises by `bias_rate` if its load in the whole batch is below the
  mean, and falls by it if above. Float32 throughout and 1e-20 in the gates' denominator, as Hugging Face; the
  official code computes scores in the weights' type. Experts of other nodes get -inf. The paper drops
  nothing; under capacity first choices claim slots first.

  k: experts per token; the paper's model takes 8 of 256.
  nodes: number of groups of consecutive experts (n_group in the official code); the paper's 8.
  nodes_per_token: how many of them a token may use (topk_group), those with the largest sum of their two best
    biased scores; the paper's 4.
  scale: sum of a token's gates (routed_scaling_factor); the paper's 2.5.
  bias_rate: the paper's gamma; 0 keeps the bias as it is.
  sequence_balance_weight: coefficient of each sequence's balance loss, the paper's alpha.
  """

  held_to = "logits of Hugging Face's DeepSeek-V3; gates: two own scripts"

  def __init__(self, d: int, num_experts: int, k: int = 2, *, nodes: int = 1, nodes_per_token: int = 1,
               scale: float = 2.5, bias_rate: float = 1e-3, sequence_balance_weight: float = 1e-4,
               rngs: nnx.Rngs):
    check_k(k, num_experts)
    check(nodes == 1 or (nodes > 1 and num_experts % nodes == 0 and num_experts >= 2 * nodes), "router.nodes",
          nodes, f"does not divide num_experts={num_experts} into nodes of 2 or more; choose a divisor, or 1 "
          "for no limit")
    check(1 <= nodes_per_token <= nodes, "router.nodes_per_token", nodes_per_token,
          f"is not between 1 and router.nodes={nodes}")
    reach = num_experts // nodes * nodes_per_token
    check(k <= reach, "router.k", k, f"is more than the {reach} experts on a token's nodes; lower k or raise "
          "router.nodes_per_token")
    self.num_experts, self.k, self.nodes, self.nodes_per_token = num_experts, k, nodes, nodes_per_token
    self.scale, self.bias_rate = scale, bias_rate
    self.loss_weights = {"sequence_balance": sequence_balance_weight}
    if k == 1:
      self.no_gradient = (f"gates of sum router.scale={scale:g} over router.k=1 choice are constant; choose "
                          "router.k=2 or more")
    self.causality, self.drop_causality = "self", "past" if k == 1 else "batch"
    self.w = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d, num_experts)), axes=("embed", "router"))
    self.bias_E = nnx.Variable(jnp.zeros(num_experts))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    return self.route(scores.linear(x_GTD, self.w[...]), tokens.mask, tokens.sequence)

  def route(self, logit_GTE: Array, mask_GT: Array, sequence_GT: Array | None = None) -> Routing:
    """The routing of given logits; without `sequence_GT` each group is one sequence."""
    score_GTE = jax.nn.sigmoid(logit_GTE)
    biased_GTE = jax.lax.stop_gradient(score_GTE + self.bias_E[...][None, None])
    expert_GTK, _ = scores.top_k(self._on_best_nodes(biased_GTE), self.k)
    gate_GTK = jnp.take_along_axis(score_GTE, expert_GTK, axis=-1)
    gate_GTK *= self.scale / (gate_GTK.sum(-1, keepdims=True) + 1e-20)

    prob_GTE = score_GTE / (score_GTE.sum(-1, keepdims=True) + 1e-20)
    chosen_GTE = scores.scatter_to_experts(jnp.ones_like(gate_GTK), expert_GTK, self.num_experts)
    if sequence_GT is None:
      sequence_GT = jnp.zeros(mask_GT.shape, jnp.int32)
    return lists.token_choice(expert_GTK, gate_GTK, prob_GTE, mask_GT, losses={
        "sequence_balance": losses.sequence_balance(prob_GTE, chosen_GTE, mask_GT, sequence_GT)})

  def _on_best_nodes(self, biased_GTE: Array) -> Array:
    """-inf for experts that are not on the token's `nodes_per_token` best nodes."""
    if self.nodes_per_token == self.nodes:
      return biased_GTE
    G, T, E = biased_GTE.shape
    by_node = biased_GTE.reshape(G, T, self.nodes, E // self.nodes)
    _, best_two = scores.top_k(by_node, 2)
    best_nodes, _ = scores.top_k(best_two.sum(-1), self.nodes_per_token)
    allowed = scores.scatter_to_experts(jnp.ones(best_nodes.shape), best_nodes, self.nodes) > 0
    return jnp.where(allowed[..., None], by_node, -jnp.inf).reshape(G, T, E)

  def next_state(self, state: Any, params: Any, metrics: dict[str, Pair], stats: dict[str, Array]) -> Any:
    load_E = metrics["load"][0]
    return {**state, "bias_E": state["bias_E"] + self.bias_rate * jnp.sign(load_E.mean() - load_E)}
