"""One update: the same for any mesh and any accumulation, and nothing else than the objective says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.tasks import task_of
from sparse_experts.training import objectives
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.state import abstract_state, make_state
from sparse_experts.training.step import make_train_step, micro_batches
from tests.training.toy import ToyModel, toy_batch, toy_config

TOY = ToyModel()


@functools.cache  # compiling is what takes the time here: runs are shared between tests
def _run(model=TOY, steps=1, mesh_shape=(1, 1, 1), fsdp=False, same_batch=False, **train):
  config = toy_config(steps=max(steps, 4), **train)
  mesh = partitioning.make_mesh(*mesh_shape)
  with partitioning.use(mesh):
    rule = make_optimizer(config, model.axes)
    state = make_state(model, rule, 0, abstract_state(model, rule, mesh, fsdp))
    step = jax.jit(make_train_step(model, rule, config))
    history = []
    for i in range(steps):
      rows = jax.device_put(toy_batch(0 if same_batch else i), partitioning.batch_sharding(mesh))
      state, metrics = step(state, rows, jax.random.key(0))
      history.append(jax.device_get(metrics))
  return jax.device_get(state), history


@pytest.mark.parametrize("layer_losses", ["mean", "sum"])
def test_objective_by_hand(layer_losses):
  model, config, batch = ToyModel(), toy_config(layer_losses=layer_losses), toy_batch()
  params, buffers = model.init(jax.random.key(0))
  logits, routings = model.apply(params, buffers, batch)
  ce = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1)[..., 0]
  expected = (ce * batch["weights"]).sum() / batch["weights"].sum()
  per_layer = [0.5 * r.losses["load_balance"][0] / r.losses["load_balance"][1]
               + 0.25 * r.losses["z"][0] / r.losses["z"][1] for r in routings.values()]
  expected_aux = np.mean(per_layer) if layer_losses == "mean" else np.sum(per_layer)
  sums = task_of(config).train_sums(model, params, buffers, batch)
  value, aux = objectives.total(
      sums, objectives.whole(sums), objectives.loss_weights(model), objectives.layer_losses(model, config))
  np.testing.assert_allclose(aux, expected_aux, rtol=1e-5)
  np.testing.assert_allclose(value, expected + expected_aux, rtol=1e-5)


def test_accumulation_is_one_batch():
  """Padding is uneven: the first micro-batch of four holds no real token at all."""
  whole, (metrics,) = _run()
  parts, (metrics_parts,) = _run(accumulate=4)
  assert metrics.keys() == metrics_parts.keys()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), metrics, metrics_parts)
  # Adam's first moment is the gradient times 1 - b1: compares gradients, not their signs.
  moments = [jax.tree.leaves(s.opt_state[1][0].mu) for s in (whole, parts)]
  assert any(np.abs(m).max() > 1e-3 for m in moments[0])
  for a, b in zip(*moments, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # sums in another order


def test_counts_need_no_forward_pass():
  """What accumulation computes before its first micro-batch: masks only, no product, no parameter."""
  model, batch = ToyModel(), toy_batch()
  params, buffers = model.init(jax.random.key(0))
  task = task_of(toy_config())
  text = jax.jit(lambda p: objectives.whole(task.train_sums(model, p, buffers, batch))).lower(
      params).compile().as_text()
  assert "dot(" not in text and "exponential" not in text


def test_micro_batches_keep_rows_together():
  parts = micro_batches({"x": jnp.arange(24).reshape(8, 3)}, 2)["x"]
  np.testing.assert_array_equal(parts.reshape(8, 3), jnp.arange(24).reshape(8, 3))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_router_state_moves_once_per_step(accumulate):
  state, history = _run(model=ToyModel(experts=8), steps=3, accumulate=accumulate)
  for n, layer in enumerate(ToyModel().sparse_layers):
    seen = sum(m[f"router/{layer}/load"][0] for m in history)
    np.testing.assert_array_equal(state.buffers["stack"]["calls"][n], seen)
    assert seen.sum() == sum((toy_batch(i)["segments"] > 0).sum() for i in range(3))


def test_noise_is_keyed_by_seed_and_step():
  """With one batch and a learning rate of 0 only the noise moves the loss."""

  def losses(seed):
    config, key = toy_config(), jax.random.key(seed)
    config.optimizer.learning_rate = 0.0
    model = ToyModel(noise=1.0)
    rule = make_optimizer(config, model.axes)
    step = jax.jit(make_train_step(model, rule, config))
    state = make_state(model, rule, 0, abstract_state(model, rule, partitioning.make_mesh(), False))
    start, found = state, []
    for _ in range(2):
      state, metrics = step(state, toy_batch(), key)
      found.append(float(metrics["loss"][0]))
    assert float(step(start, toy_batch(), key)[1]["loss"][0]) == found[0]
    return found

  found = losses(0) + losses(1)
  assert len(set(found)) == 4


_SLOW = [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((1, 8, 1), (8, 1, 1), (2, 2, 2))]


@pytest.mark.parametrize("mesh", [(2, 4, 1), *_SLOW], ids=str)
def test_every_mesh_gives_the_same_numbers(mesh):
  one = dict(model=ToyModel(experts=8), steps=3, accumulate=2)
  state, history = _run(**one)
  other, other_history = _run(**one, mesh_shape=mesh, fsdp=mesh == (2, 4, 1))
  close = lambda rtol: lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)
  jax.tree.map(close(1e-5), history, other_history)
  jax.tree.map(close(1e-4), state.params, other.params)  # Adam divides small gradients by themselves


def test_fsdp_spreads_parameters_and_their_moments():
  mesh = partitioning.make_mesh(2, 4)
  model = ToyModel(experts=8)
  for name in ("adamw", "adafactor"):
    config = toy_config()
    config.optimizer.name = name
    with partitioning.use(mesh):
      abstract = abstract_state(model, make_optimizer(config, model.axes), mesh, fsdp=True)
    spread = [a for a in jax.tree.leaves(abstract.opt_state) if a.shape == (16, 8)]
    assert spread and all(a.sharding.shard_shape(a.shape) == (16, 1) for a in spread)
    assert abstract.params["stack"]["w"].sharding.shard_shape((2, 8, 8, 8)) == (2, 2, 8, 8)


def test_loss_falls_on_a_toy():
  _, history = _run(steps=30, same_batch=True)
  losses = [m["loss"][0] / m["loss"][1] for m in history]
  assert losses[-1] < 0.5 * losses[0]


def test_eval_sums_ignore_padding_rows_and_add_up():
  model, batch = ToyModel(), toy_batch()
  params, buffers = model.init(jax.random.key(0))
  step = jax.jit(functools.partial(task_of(toy_config()).eval_sums, model))
  whole = step(params, buffers, batch)
  halves = [{k: v[i:i + 8] for k, v in batch.items()} for i in (0, 8)]
  padded = [{k: np.concatenate([v, np.zeros_like(v)]) for k, v in h.items()} for h in halves]
  for parts in (halves, padded):
    added = jax.tree.map(lambda a, b: a + b, *(step(params, buffers, h) for h in parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, added)
  assert whole["nats_per_target"][1] + whole["nats_per_mark"][1] == whole["loss"][1] == batch["weights"].sum()
  assert whole["nats_per_byte"][1] == batch["target_bytes"].sum()
