"""Metadata routing."""

import jax.numpy as jnp
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router

ROUTER = make_router("task", 2, 3, rngs=nnx.Rngs(0))


def test_a_task_has_its_expert():
  """And no vote on it: task 4 is served by the expert of task 1."""
  tokens = Tokens(mask=jnp.array([[True, True, True, True, False]]), task=jnp.array([[0, 2, 4, 1, 2]]))
  routing = ROUTER(jnp.ones((1, 5, 2)), tokens, None)
  assert routing.expert.tolist() == [[0, 2, 1, 1, 2]]
  assert routing.valid.tolist() == tokens.mask.tolist()
  assert routing.metrics["load"][0].tolist() == [1, 2, 1]


def test_tasks_must_be_there():
  with pytest.raises(UserError, match="router 'task' needs tokens.task, which is None; give batches a"):
    ROUTER(jnp.ones((1, 5, 2)), Tokens(mask=jnp.ones((1, 5), bool)), None)
