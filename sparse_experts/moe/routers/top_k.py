"""Token choice: each token takes the k experts with the largest probability."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_k, check_known
from sparse_experts.moe.routing import Convention, Loss, Router, Routing, Tokens, lists, losses, noise, scores
from sparse_experts.moe.routing.assignments import count_experts

GATES = ("raw", "renormalized", "renormalized_after_drops")
CHOOSE = ("largest", "sampled")
BALANCE_COUNTS = ("first", "first_kept", "multi_hot", "assignments")
LOSS_PADDING = ("excluded", "flaxformer", "hugging_face")
SWITCH = Convention(1.25, 2.0, "flaxformer")
GSHARD = Convention(2.0, 2.0, "lingvo")  # slots per token, so an even load of k = 2 fits
MEGABLOCKS = Convention(layer_losses="mean")


class TopKRouter(Router):
  """Top-k of Switch (Fedus et al. 2021), GShard (Lepikhin et al. 2020), ST-MoE (Zoph et al. 2022) and others.

  Their conventions differ in the arguments. Padding enters no count, mean or denominator, unless
  `loss_padding` says so. (Mesh masks only the probabilities: with padding its balance loss differs.)

  k: experts per token.
  jitter: while training, the router's input is multiplied by U(1 - jitter, 1 + jitter).
  input_dropout: while training, dropout of the router's input with this probability (in Switch's comparison
    worse than jitter, better than `sampled`; Mesh takes 0.1).
  choose: `largest`: the experts with the largest probabilities. `sampled`: while training, experts are drawn
    from the probabilities without replacement (in Switch's comparison worse than `largest` and than jitter).
  gate: `raw` probabilities; `renormalized` to sum to 1 over the k choices; or
    `renormalized_after_drops`, over those that got a slot (Lingvo's alternative); the others get 0.
  order: who claims slots first. `choice`: all first choices in token order, then all second ones (GShard,
    Mesh, Flaxformer's masked router, V-MoE). `token`: a token claims all its slots before the next (MaxText).
    `batch_priority`: as `choice`, tokens sorted by largest probability (Riquelme et al. 2021), in no causal
    decoder.
  skip_threshold: in training, later choices are used with probability min(1, gate / threshold); 0: always.
    GShard (0.5) and ST-MoE (0.2) compare the gate after `renormalized`. Mesh skips in evaluation too.
  bias: whether a learnt number per expert is added to the logits (gpt-oss); it starts at 0.
  balance_count: what counts as "sent to e" in the load-balancing loss, before skips and drops.
    `first`: first choices (Switch, GShard, Mesh; 1 when even). `first_kept`: those of them that got a slot,
    as shares of all tokens (st-moe-pytorch), so drops lower the loss. `multi_hot`: tokens with e among their
    choices (Flaxformer, Hugging Face; k when even). `assignments`: the same, divided by k.
  scope: over what both losses are: each `group` (Switch, GShard, Flaxformer), or the `batch` (Hugging Face).
  loss_padding: `excluded`, or, to reproduce others' losses only, means are over all tokens, of which padding
    has no choice, no probability, and logits of 0 (`flaxformer`), or all as any token (`hugging_face`).
  load_balance_weight, z_weight: coefficients of the two losses in the training loss.

  Without a capacity in the config k = 1 has Switch's, 2 GShard's (2 S / E slots, Lingvo's rounding), more
  none (OLMoE). Layers' losses add up, as in Switch and Mesh; with k > 2 they are averaged (MegaBlocks).
  """

  held_to = ("logits of Hugging Face's Switch, Mixtral, OLMoE and Qwen; losses and drops: two own scripts, "
             "by the rules of Mesh, Flaxformer and Lingvo as read")

  @classmethod
  def convention(cls, k: int) -> Convention:
    return {1: SWITCH, 2: GSHARD}.get(k, MEGABLOCKS)

  def __init__(self, d: int, num_experts: int, k: int = 1, *, jitter: float = 0.0,
               input_dropout: float = 0.0, choose: str = "largest", gate: str = "raw", order: str = "choice",
               skip_threshold: float = 0.0, bias: bool = False, balance_count: str = "first",
               scope: str = "group", loss_padding: str = "excluded", load_balance_weight: float = 1e-2,
               z_weight: float = 0.0, rngs: nnx.Rngs):
    check_k(k, num_experts)
    check_known("router.choose", choose, CHOOSE)
    check_known("router.gate", gate, GATES)
    check_known("router.order", order, lists.ORDERS)
    check_known("router.balance_count", balance_count, BALANCE_COUNTS)
    check_known("router.scope", scope, losses.SCOPES)
    check_known("router.loss_padding", loss_padding, LOSS_PADDING)
    check(0 <= input_dropout < 1, "router.input_dropout", input_dropout,
          "is out of range; choose from 0 to below 1")
    self.num_experts, self.k, self.jitter, self.scope, self._has_bias = num_experts, k, jitter, scope, bias
    self.choose, self.gate, self.order, self.balance_count = choose, gate, order, balance_count
    self.skip_threshold, self.loss_padding, self.input_dropout = skip_threshold, loss_padding, input_dropout
    self.most_experts = k if skip_threshold and k > 1 else None
    self.reads_padding = loss_padding == "hugging_face"
    self.loss_weights = {"load_balance": load_balance_weight, "z": z_weight}
    if k == 1 and gate != "raw":
      self.no_gradient = (f"router.gate='{gate}' with router.k=1 makes every gate 1; choose router.gate=raw, "
                          "or router.k=2 or more")
    self.causality = "batch" if order == "batch_priority" else "self"
    # Choice-major: a later token's first choice may evict an earlier token's second.
    self.drop_causality = "past" if k == 1 or order == "token" else "batch"
    # Normal with deviation 0.02, as Flaxformer.
    self.w = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d, num_experts)), axes=("embed", "router"))
    if bias:  # otherwise the name is free for routers that inherit this one
      self.b = nnx.Param(jnp.zeros(num_experts), axes=("router",))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    jitter_key, draw_key, dropout_key = [None] * 3 if key is None else jax.random.split(key, 3)
    if self.jitter and jitter_key is not None:
      x_GTD = noise.jitter(x_GTD, self.jitter, jitter_key)
    if self.input_dropout and dropout_key is not None:
      x_GTD = noise.dropout(x_GTD, self.input_dropout, dropout_key)
    return self.route(self.score(x_GTD), tokens.mask, capacity=capacity, key=draw_key)

  def score(self, x_GTD: Array) -> Array:
    """Logits, float32 _GTE."""
    return scores.linear(x_GTD, self.w[...], self.b[...] if self._has_bias else None)

  def gates(self, logit_GTE: Array, expert_GTK: Array, prob_GTK: Array) -> Array:
    """Gates of the chosen experts, whose probabilities are given; `gate` says what becomes of them."""
    return prob_GTK

  def balanced_prob(self, logit_GTE: Array, prob_GTE: Array) -> Array:
    """The probabilities that the load-balancing loss makes even."""
    return prob_GTE

  def route(self, logit_GTE: Array, mask_GT: Array, *, capacity: int | None = None,
            key: Array | None = None) -> Routing:
    """The routing of given logits; `key` is for draws, `capacity` for gates that depend on drops."""
    prob_GTE = scores.softmax(logit_GTE)
    if self.choose == "sampled" and key is not None:
      sample_key, key = jax.random.split(key)
      # The largest of log p + Gumbel noise are draws from p without replacement.
      expert_GTK, _ = scores.top_k(logit_GTE + jax.random.gumbel(sample_key, logit_GTE.shape), self.k)
      gate_GTK = scores.pick(prob_GTE, expert_GTK)
    else:
      expert_GTK, gate_GTK = scores.top_k(prob_GTE, self.k)
    gate_GTK = self.gates(logit_GTE, expert_GTK, gate_GTK)
    if self.gate == "renormalized":
      gate_GTK /= gate_GTK.sum(-1, keepdims=True)
    valid_GTK = chosen_GTK = jnp.broadcast_to(mask_GT[..., None], expert_GTK.shape)
    if self.skip_threshold and self.k > 1 and key is not None:
      used_GTK = jax.random.uniform(key, gate_GTK.shape) < gate_GTK / self.skip_threshold
      valid_GTK &= used_GTK.at[..., 0].set(True)

    routing = lists.token_choice(
        expert_GTK, gate_GTK, prob_GTE, mask_GT, valid_GTK=valid_GTK, order=self.order)
    count_GE = self._count(routing, expert_GTK, chosen_GTK | self.reads_padding, capacity)
    routing = routing.replace(losses=self.auxiliary(
        logit_GTE, self.balanced_prob(logit_GTE, prob_GTE), count_GE, mask_GT))
    if self.gate == "renormalized_after_drops":
      return lists.renormalized_after_drops(routing, capacity, self.num_experts, self.k)
    return routing

  def _count(self, routing: Routing, expert_GTK: Array, chosen_GTK: Array, capacity: int | None) -> Array:
    """What `balance_count` counts, _GE."""
    if self.balance_count == "first_kept":
      first_GA = lists.kept(routing, capacity, self.num_experts) & (routing.ranks() == 0)
      return count_experts(routing.expert, first_GA, self.num_experts)
    K = 1 if self.balance_count == "first" else self.k
    flat = lambda a_GTK: a_GTK[..., :K].reshape(a_GTK.shape[0], -1)
    return count_experts(flat(expert_GTK), flat(chosen_GTK), self.num_experts)

  def auxiliary(self, logit_GTE: Array, prob_GTE: Array, count_GE: Array, mask_GT: Array) -> dict[str, Loss]:
    """The losses of probabilities and counts, over `scope`, with padding as `loss_padding` says."""
    counted_GT = mask_GT | (self.loss_padding != "excluded")
    if self.loss_padding == "flaxformer":
      logit_GTE, prob_GTE = (jnp.where(mask_GT[..., None], a, 0.0) for a in (logit_GTE, prob_GTE))
    # With these in the denominator the shares of `multi_hot` sum to k, those of `first_kept` to what is kept.
    assigned_G = counted_GT.sum(-1) * (self.k if self.balance_count == "assignments" else 1)
    return {"load_balance": losses.load_balance(prob_GTE, count_GE, counted_GT, self.scope, assigned_G),
            "z": losses.z(logit_GTE, counted_GT, self.scope)}
