"""A control: the same router with its first random weights, which never change."""

import math
from collections.abc import Callable
from typing import Any

from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check
from sparse_experts.moe.routing import Pair, Router, Routing, Tokens

# Routers whose scores are a product with one random matrix; what else they learn starts at 0.
LINEAR = ("top_k", "expert_choice", "v_moe", "limoe", "deepseek_moe", "deepseek_v3", "no_token_left_behind")


class Frozen(nnx.Variable):
  """A weight that was drawn once: saved with the run, seen by no gradient, optimizer or weight decay."""


class FrozenRouter(Router):
  """Another router with its random weights W held: a control for what learning the routing adds.

  It is no paper's method. All parameters of the inner router become state without gradient, which optimizers
  and weight decay do not see; each layer draws its own. Everything else is the inner router's: gates, losses,
  and state that balances loads (`deepseek_v3`'s bias). Only a capacity has to be set, it is dropless without.
  Gates and losses still have a gradient in the tokens' vectors, so the layers before learn to be routed, and
  a token's expert changes as its vector does: W is frozen, not the assignment. Say which balancing was on
  when you compare, as loads may drift without any.

  of: name of the inner router, one that scores by a random matrix. Other arguments are the inner router's.
  make_router: makes the inner router; the registry passes it.
  """

  held_to = "the inner router's values, bit for bit"

  def __init__(self, d: int, num_experts: int, *, of: str = "top_k", make_router: Callable[..., Router],
               rngs: nnx.Rngs, **arguments: Any):
    check(of in LINEAR, "router.of", f"'{of}'",
          f"has no random matrix to hold; choose from {', '.join(LINEAR)}")
    self.inner = make_router(of, d, num_experts, rngs=rngs, **arguments)
    weights = {name: a for name, a in vars(self.inner).items() if isinstance(a, nnx.Param)}
    for name, weight in weights.items():
      setattr(self.inner, name, Frozen(weight[...]))
    self.fixed_weights = sum(math.prod(weight.shape) for weight in weights.values() if weight.ndim > 1)
    self.num_experts, self.k, self.most_experts = num_experts, self.inner.k, self.inner.most_experts
    self.reads_padding, self.loss_weights = self.inner.reads_padding, self.inner.loss_weights
    self.causality, self.drop_causality = self.inner.causality, self.inner.drop_causality

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    return self.inner(x_GTD, tokens, capacity, key)

  def next_state(self, state: Any, params: Any, metrics: dict[str, Pair], stats: dict[str, Array]) -> Any:
    return {**state, "inner": self.inner.next_state(state["inner"], {}, metrics, stats)}
