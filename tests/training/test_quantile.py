"""Quantile balancing's bias after train steps: the same for any mesh, groups and accumulation."""

import jax
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.models import build
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.state import abstract_state, make_state
from sparse_experts.training.step import make_train_step
from tests.models.tiny import tiny
from tests.training.toy import toy_batch

STEPS, VOCAB = 3, 16


def bias_after(mesh_shape, accumulate, group_size=8):
  """The biases of the layer after each step, at a learning rate of 0: rounding must not move the weights."""
  config = tiny(num_layers=1, moe_every=1, group_size=group_size, router=dict(name="quantile", k=2))
  config.train.update(dict(batch_size=32, accumulate=accumulate, steps=STEPS))
  config.optimizer.learning_rate = 0.0
  model, mesh, batch = build(config, VOCAB), partitioning.make_mesh(*mesh_shape), toy_batch(rows=32)
  with partitioning.use(mesh):
    rule = make_optimizer(config, model.axes)
    state = make_state(model, rule, 0, abstract_state(model, rule, mesh, False))
    wide = lambda path, x: x * 50 if "router" in str(path) else x
    state = state.replace(params=jax.tree_util.tree_map_with_path(wide, state.params))
    rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
    step, found = jax.jit(make_train_step(model, rule, config)), []
    for _ in range(STEPS):
      state, metrics = step(state, rows, jax.random.key(0))
      found.append(np.concatenate([np.ravel(a) for a in jax.tree.leaves(jax.device_get(state.buffers))]))
      assert not metrics["skipped"][0]
  return np.stack(found)


@pytest.fixture(scope="module")
def alone():
  return bias_after((1, 1), 1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, accumulate, group_size", [
    ((1, 1), 4, 8), ((2, 4), 1, 8), ((2, 4), 4, 8), ((1, 1), 1, 4)], ids=str)
def test_the_bias_is_of_the_whole_step(alone, mesh, accumulate, group_size):
  """Rows are of uneven length, and with accumulation the first micro-batch is empty."""
  assert np.abs(alone[0]).max() > 0.01 and np.abs(np.diff(alone, axis=0)).max() > 1e-3
  np.testing.assert_allclose(bias_after(mesh, accumulate, group_size), alone, atol=1e-6)
