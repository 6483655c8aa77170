"""Local search of COMET+: learns for some steps which expert each choice of another router means."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.config import ROUTERS
from sparse_experts.errors import UserError, nearest
from sparse_experts.moe.arguments import check
from sparse_experts.moe.routing import Pair, Router, Routing, Tokens, by_token, lists, router_metrics, scores
from sparse_experts.moe.routing.auction import auction

TEMPERATURE = 1e-3, 1e-7  # of the first step, and what it falls to over the phase
TURNS = 20, 150  # of Sinkhorn's normalisations, likewise
BIDS = 1000  # of the auction: its permutation's sum is within E / 1000 of the largest


class PermutedRouter(Router):
  """Another router, whose gate g becomes P^T g: P is soft for `steps` optimizer steps, then a permutation.

  P = Sinkhorn(L / temperature) for a parameter L of [E, E], see `soft_permutation`. Even at a small
  temperature P is not a permutation, so at the end the assignment with the largest sum of the last step's P
  is taken and kept. It is found by an auction, within E / 1000 of the largest sum; the authors' is exact.
  Without a key (evaluation) the permutation is always hard: the last step's, at first the identity. Ibrahim
  et al. 2023 (COMET+, Top-k+, Hash-r+), with their schedules, and without noise, as in their settings.

  P's rows do not sum to 1, so permuted gates are scaled to the sum of the inner router's gates (the authors'
  to 1). While P is soft, all experts are computed; later those that the inner router chooses, in its order of
  claims. All choices of a router share one permutation: the authors' `learn_k_permutations` is left out.

  of: name of the inner router, which must list each token equally often. Other arguments are the inner
    router's.
  steps: length of the soft phase; the authors take 1% to 10% of the training.
  permutation_entropy_weight: coefficient of P's entropy, the authors' zeta.
  make_router: makes the inner router; the registry passes it.
  """

  held_to = "an own float64 loop, by the authors' code as read"

  def __init__(self, d: int, num_experts: int, *, of: str = "top_k", steps: int = 100,
               permutation_entropy_weight: float = 1e-4, make_router: Callable[..., Router], rngs: nnx.Rngs,
               **arguments: Any):
    if of == "permuted" or (of not in ROUTERS and ":" not in of):
      raise UserError(f"router.of='{of}' is no router to permute{nearest(of, ROUTERS)}")
    check(steps >= 1, "router.steps", steps,
          f"is out of range; choose 1 or more, or router.name='{of}' alone")
    self.inner = make_router(of, d, num_experts, rngs=rngs, **arguments)
    self.num_experts, self.k, self.of, self.steps = num_experts, self.inner.k, of, steps
    self.loss_weights = self.inner.loss_weights | {"permutation_entropy": permutation_entropy_weight}
    self.most_experts, self.reads_stream = self.inner.most_experts, self.inner.reads_stream
    self.reads_padding = self.inner.reads_padding
    self.no_gradient = self.inner.no_gradient
    self.causality = self.inner.causality  # drops: the soft list claims by choice
    first_EE = jax.random.uniform(rngs.params(), (num_experts, num_experts), minval=-0.05, maxval=0.05)
    self.logit_EE = nnx.Param(first_EE, axes=("router", None))
    self.step = nnx.Variable(jnp.zeros((), jnp.int32))
    self.expert_E = nnx.Variable(jnp.arange(num_experts, dtype=jnp.int32))  # what each inner one means

  @property
  def reward_weights(self) -> dict[str, float]:
    return self.inner.reward_weights

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    inner, E, mask_GT = self.inner(x_GTD, tokens, capacity, key), self.num_experts, tokens.mask
    if (K := inner.rows_per_token) is None:
      raise UserError(f"router.of='{self.of}' lists tokens a varying number of times, which cannot be "
                      "permuted; choose a router where tokens choose, such as 'top_k'")
    hard_EE = jax.nn.one_hot(self.expert_E[...], E)
    is_soft = self.step[...] < self.steps
    plan_EE = hard_EE if key is None else jax.lax.cond(
        is_soft, lambda logit_EE: soft_permutation(logit_EE, self.step[...] / self.steps), lambda _: hard_EE,
        self.logit_EE[...])

    to_tokens, used_GA = by_token(inner, K), jnp.where(inner.valid, inner.gate, 0.0)
    gate_GTE = scores.scatter_to_experts(to_tokens(used_GA), to_tokens(inner.expert), E)
    gate_GTE = _permute(gate_GTE, plan_EE)
    prob_GTE = None if inner.prob is None else _permute(inner.prob, plan_EE)
    arrays = inner.token, self.expert_E[...][inner.expert], inner.gate, inner.valid
    if key is not None:  # one program: both lists, of one length
      soft = lists.order_assignments("choice", *lists.every_expert(gate_GTE, mask_GT))
      hard = _fill_up(arrays, mask_GT.shape[1], E)
      arrays = jax.tree.map(lambda a, b: jnp.where(is_soft, a, b), soft, hard)
    token_GA, expert_GA, gate_GA, valid_GA = arrays
    share_GTE = gate_GTE / jnp.maximum(gate_GTE.sum(-1, keepdims=True), 1e-30)
    metrics = router_metrics(expert_GA, valid_GA, share_GTE if prob_GTE is None else prob_GTE, mask_GT, E)
    count = mask_GT.sum(dtype=jnp.float32)
    return inner.replace(
        token=token_GA, expert=expert_GA, gate=gate_GA, valid=valid_GA, prob=prob_GTE,
        rows_per_token=K if key is None else E,
        expected_fraction=inner.expected_fraction if key is None else self.k / E,
        losses=inner.losses | {"permutation_entropy": (entropy(plan_EE) * count, count)},
        metrics=inner.metrics | metrics,
        stats=inner.stats | {"plan_EE": plan_EE, "inner_load_E": inner.metrics["load"][0]})

  def next_state(self, state: Any, params: Any, metrics: dict[str, Pair], stats: dict[str, Array]) -> Any:
    """Counts the step; in the soft phase takes the permutation nearest to the step's P."""
    is_soft = state["step"] < self.steps
    # Without rows to assign the auction ends at once. Sums of P over micro-batches rank assignments alike.
    best_1E = auction(stats["plan_EE"][None], jnp.broadcast_to(is_soft, (1, self.num_experts)), BIDS)
    new = {**state, "step": state["step"] + 1, "expert_E": jnp.where(is_soft, best_1E[0], state["expert_E"])}
    if "inner" in state:
      metrics = metrics | {"load": (stats["inner_load_E"], metrics["load"][1])}
      new["inner"] = self.inner.next_state(state["inner"], params.get("inner", {}), metrics, stats)
    return new


def soft_permutation(logit_EE: Array, progress: Array) -> Array:
  """P = Sinkhorn(L / temperature) at `progress` (0 to 1) of the phase: rows and columns to sum 1, in turns.

  In log space. Columns sum to 1 exactly; rows do not, and may be far from it: within [1/E², E]. The
  temperature falls on a log scale, the number of turns rises. The loop always runs the largest number of
  turns, so that it is differentiable.
  """
  (first, last), (fewest, most) = TEMPERATURE, TURNS
  turns = (fewest + (most - fewest) * progress).astype(jnp.int32)

  def turn(log_EE, i):
    next_EE = jax.nn.log_softmax(jax.nn.log_softmax(log_EE, axis=1), axis=0)
    return jnp.where(i < turns, next_EE, log_EE), None

  log_EE = logit_EE / (first * (last / first) ** progress)
  return jnp.exp(jax.lax.scan(turn, log_EE, jnp.arange(most, dtype=jnp.int32))[0])


def entropy(plan_EE: Array) -> Array:
  """Σ -p log(p + 1e-6) over P, plus the same over P with rows divided by their sums."""
  of = lambda p_EE: -(p_EE * jnp.log(p_EE + 1e-6)).sum()
  return of(plan_EE) + of(plan_EE / plan_EE.sum(1, keepdims=True))


def _permute(value_GTE: Array, plan_EE: Array) -> Array:
  """P^T value of each token, scaled to the sum that it had."""
  moved_GTE = scores.linear(value_GTE, plan_EE)
  sum_GT1 = moved_GTE.sum(-1, keepdims=True)
  scale_GT1 = value_GTE.sum(-1, keepdims=True) / jnp.where(sum_GT1 > 0, sum_GT1, 1.0)
  return moved_GTE * scale_GT1


def _fill_up(arrays: tuple[Array, ...], T: int, num_experts: int) -> tuple[Array, ...]:
  """A list (token, expert, gate, valid) made E rows per token long by rows that are not valid."""
  token_GA, *others = arrays
  G, A = token_GA.shape
  more = T * num_experts - A
  rest_GA = jnp.broadcast_to(jnp.arange(more, dtype=jnp.int32) % T, (G, more))
  return jnp.concatenate([token_GA, rest_GA], 1), *(jnp.pad(a, ((0, 0), (0, more))) for a in others)
