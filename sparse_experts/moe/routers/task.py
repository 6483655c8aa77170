"""Metadata routing: the expert is given by a text's domain, language or task."""

from flax import nnx
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.routing import Router, Routing, Tokens, lists


class TaskRouter(Router):
  """Expert number task modulo E: an expert per domain, language or task, known beforehand; gate 1.

  The "tag" baseline of Muqeeth et al. 2023 (SMEAR); Fedus et al. 2022 (the review of sparse models) list it
  as static routing. A model's batches set `tokens.task` to their `domain`.
  """

  held_to = "cases by hand"
  causality = "self"
  drop_causality = "past"

  def __init__(self, d: int, num_experts: int, *, rngs: nnx.Rngs):
    self.num_experts = num_experts

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    if tokens.task is None:
      raise UserError("router 'task' needs tokens.task, which is None; give batches a 'domain', or the layer"
                      " Tokens(task=...); to sample, where prompts have none, choose another router")
    return lists.fixed((tokens.task % self.num_experts)[..., None], tokens.mask, self.num_experts)
