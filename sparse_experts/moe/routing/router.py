"""The interface of a router, and the metrics that all routers report under the same names."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.routing import losses, scores
from sparse_experts.moe.routing.assignments import Routing, Tokens, count_experts
from sparse_experts.moe.routing.convention import Convention
from sparse_experts.moe.routing.statistic import Pair

# What a token's routing may depend on, from narrow to wide: the token itself; earlier tokens of its group, of
# other sequences too; its whole sequence; its whole group.
CAUSALITY = ("self", "past", "sequence", "batch")


class Router(nnx.Module):
  """Scores tokens and lists assignments; knows neither buffers nor devices.

  A subclass sets the static fields below and implements `__call__`. State without gradient is an
  `nnx.Variable` that is not a Param; it changes in `next_state` only, once per optimizer step.
  """

  num_experts: int
  k: int = 1  # assignments per token, for the capacity rules that count them
  most_experts: int | None = None  # of a token in a trained model, if not every token has k; FLOPs count it
  fixed_weights: int = 0  # numbers in matrices that score tokens and are no parameters; FLOPs count them
  # What an assignment depends on. A causal decoder refuses 'sequence' and 'batch', so set it if it is less.
  causality: str = "batch"
  reads_stream: bool = False  # its input is the block's residual stream instead of the experts' normed input
  reads_padding: bool = False  # its input holds what stands at padding, instead of zeros
  drop_causality: str = "batch"  # what a drop under capacity depends on: who claims slots earlier in the list
  # Why the gates are constant, so that the task's loss has no gradient for the parameters, and the way out.
  no_gradient: str = ""
  # Whose code or formula the tests' values come from; `describe --routers` shows it.
  held_to: str = ""

  _loss_weights: tuple[tuple[str, float], ...] = ()

  @classmethod
  def convention(cls, k: int) -> Convention:
    """Its paper's capacity and sum of losses, with `k` experts per token; dropless unless a router says."""
    return Convention()

  @property
  def loss_weights(self) -> dict[str, float]:
    """Coefficients, in the training loss, of the losses in `Routing.losses`; set in the constructor."""
    return dict(self._loss_weights)

  @loss_weights.setter
  def loss_weights(self, weights: dict[str, float]) -> None:
    self._loss_weights = tuple(weights.items())  # a static field is hashed

  @property
  def reward_weights(self) -> dict[str, float]:
    """Coefficients of the losses of `losses.reward`, for routers that learn from rewards; {} for others."""
    return {}

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    """Routes each group by itself. `tokens.mask` is set; `key` None means no noise."""
    raise NotImplementedError

  def next_state(self, state: Any, params: Any, metrics: dict[str, Pair], stats: dict[str, Array]) -> Any:
    """The non-parameter variables of one layer after an optimizer step.

    Computed from those before, the new parameters, and the step's sums of `Routing.metrics` and `stats`.
    """
    return state


def router_metrics(expert_GA: Array, valid_GA: Array, prob_GTE: Array, mask_GT: Array,
                   num_experts: int) -> dict[str, Pair]:
  """Per token: load [E] and experts_per_token (valid assignments, before capacity), entropy (nats) and
  confidence (largest probability)."""
  tokens = mask_GT.sum(dtype=jnp.float32)
  return {
      "load": (count_experts(expert_GA, valid_GA, num_experts).sum(0).astype(jnp.float32), tokens),
      "experts_per_token": (valid_GA.sum(dtype=jnp.float32), tokens),
      "entropy": losses.over_tokens(scores.entropy(prob_GTE), mask_GT),
      "confidence": losses.over_tokens(prob_GTE.max(-1), mask_GT),
  }
