"""Expert choice: each expert takes the tokens that want it most."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe import parallel
from sparse_experts.moe.arguments import check, check_k
from sparse_experts.moe.routing import Convention, Router, Routing, Tokens, losses, router_metrics, scores


class ExpertChoiceRouter(Router):
  """Zhou et al. 2022: softmax over experts, then every expert takes its C best tokens of the group.

  Every expert is full unless the group has fewer than C real tokens, so there is no balance loss. A token
  gets any number of experts, also none. Gates are the raw probabilities. C is the layer's capacity. In a
  dropless layer C is k · T / E rounded up, the paper's n · c / e: without a bound every expert would take
  every token. Set k to the c of training (Flaxformer's and Mesh's capacity rules do not count k: with them c
  is the capacity factor). Ties go to the earlier token, as in Flaxformer; padding is never taken, which
  Flaxformer may take with gate 0. An expert's choice depends on all tokens of the group: a causal decoder
  refuses this router.

  k: experts per token on average (c).
  token_cap: most experts of one token; 0: any number. The paper bounds them by an entropic linear program and
    takes the C best of its solution. Here it is deferred acceptance (Gale and Shapley 1962): experts ask
    their best tokens, a token refuses all but the `token_cap` experts with the largest probability, and
    refused experts ask their next tokens. No token exceeds the cap, which a program cut off after some
    iterations does not guarantee, and an expert gets fewer than C only when every other token is at the cap.
    C is then at most token_cap · T / E.
  noise: standard deviation, times E, of noise on the logits that choices and gates use; with a key only.
    V-MoE's code takes 1 (`NoisyTopItemsPerExpertRouter`).
  bias: whether a learnt number per expert is added to the logits (Flaxformer's option); it starts at 0.
  z_weight: coefficient of the z-loss in the training loss.
  """

  held_to = "two own scripts, by the paper's formula"

  @classmethod
  def convention(cls, k: int) -> Convention:
    return Convention(words="k T / E slots, all of them filled")

  def __init__(self, d: int, num_experts: int, k: int = 1, *, token_cap: int = 0, noise: float = 0.0,
               bias: bool = False, z_weight: float = 0.0, rngs: nnx.Rngs):
    check_k(k, num_experts)
    check(token_cap == 0 or token_cap >= k, "router.token_cap", token_cap, f"leaves no room for router.k={k} "
          f"experts per token on average; choose {k} or more, or 0 for no cap")
    check(not noise < 0, "router.noise", noise, "is negative; choose 0 or more")
    self.num_experts, self.k, self.token_cap, self.noise = num_experts, k, token_cap, noise
    self.loss_weights = {"z": z_weight}
    self.most_experts = k if token_cap else None  # on average: a refused token may find no expert
    self.w = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d, num_experts)), axes=("embed", "router"))
    self._has_bias = bias
    if bias:
      self.b = nnx.Param(jnp.zeros(num_experts), axes=("router",))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    logit_GTE = scores.linear(x_GTD, self.w[...], self.b[...] if self._has_bias else None)
    return self.route(logit_GTE, tokens.mask, capacity=capacity, key=key)

  def route(self, logit_GTE: Array, mask_GT: Array, *, capacity: int | None = None,
            key: Array | None = None) -> Routing:
    """The routing of given logits: expert 0's tokens, its best first, then expert 1's, and so on.

    `key` is for noise.
    """
    G, T, E = logit_GTE.shape
    C = min(-(-self.k * T // E) if capacity is None else capacity, T)
    if self.token_cap:
      C = min(C, max(self.token_cap * T // E, 1))
    noisy_GTE = logit_GTE
    if self.noise and key is not None:
      noisy_GTE += self.noise / E * jax.random.normal(key, logit_GTE.shape)
    prob_GTE = scores.softmax(noisy_GTE)
    score_GTE = jnp.where(mask_GT[..., None], jax.lax.stop_gradient(prob_GTE), -1.0)
    if self.token_cap:
      settle = functools.partial(_settle, C=C, token_cap=self.token_cap)
      score_GTE = parallel.by_group(settle, score_GTE)
    score_GET = score_GTE.swapaxes(1, 2)
    token_GEC = jnp.argsort(-score_GET, axis=-1, stable=True)[..., :C].astype(jnp.int32)
    gate_GEC = jnp.take_along_axis(prob_GTE.swapaxes(1, 2), token_GEC, axis=-1)
    valid_GEC = jnp.take_along_axis(score_GET, token_GEC, axis=-1) >= 0
    expert_GEC = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32)[None, :, None], (G, E, C))
    flat = lambda a_GEC: a_GEC.reshape(G, E * C)
    expert_GA, valid_GA = flat(expert_GEC), flat(valid_GEC)
    return Routing(
        token=flat(token_GEC), expert=expert_GA, gate=flat(gate_GEC), valid=valid_GA, prob=prob_GTE,
        losses={"z": losses.z(logit_GTE, mask_GT)},
        metrics=router_metrics(expert_GA, valid_GA, prob_GTE, mask_GT, E))


def _settle(score_GTE: Array, C: int, token_cap: int) -> Array:
  """Scores with -1 where a token refused: after that the experts' C best tokens exceed no token's cap."""

  def refused(score_GTE):
    asks_GTE = (_rank(score_GTE, axis=1) < C) & (score_GTE >= 0)
    return asks_GTE & (_rank(jnp.where(asks_GTE, score_GTE, -1.0), axis=2) >= token_cap)

  def refuse(carry):
    score_GTE, refused_GTE = carry
    score_GTE = jnp.where(refused_GTE, -1.0, score_GTE)
    return score_GTE, refused(score_GTE)

  # It ends: each round refuses at least one of a group's T·E pairs, and a refusal is final.
  return jax.lax.while_loop(lambda carry: carry[1].any(), refuse, (score_GTE, refused(score_GTE)))[0]


def _rank(score: Array, axis: int) -> Array:
  """0 for the largest along `axis`, ties to the lower index."""
  return jnp.argsort(jnp.argsort(-score, axis=axis, stable=True), axis=axis)
