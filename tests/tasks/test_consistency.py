"""Two passes of a batch and how far they diverge, against numpy; and where that would be nothing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_experts.config import default_config, replaced
from sparse_experts.errors import UserError
from sparse_experts.moe.keys import fold
from sparse_experts.tasks import consistency, sums, task_of
from sparse_experts.validation import validate
from tests.training.tiny import tiny_train
from tests.training.toy import toy_batch

RNG = np.random.default_rng(0)
QUICK = dict(train__steps=1, eval__train_windows=8, eval__min_bytes=200)


def log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def symmetric_kl(one, other):
  p, q = log_softmax(one), log_softmax(other)
  return 0.5 * ((np.exp(p) * (p - q)).sum(-1) + (np.exp(q) * (q - p)).sum(-1))


def test_the_divergence_is_half_of_both_and_both_passes_learn_from_it():
  one, other = (jnp.asarray(3 * RNG.normal(size=(2, 3, 5)), jnp.float32) for _ in range(2))
  np.testing.assert_allclose(consistency.divergence(one, other), symmetric_kl(one, other), rtol=1e-5)
  slopes = jax.grad(lambda a, b: consistency.divergence(a, b).sum(), (0, 1))(one, other)
  assert all(np.abs(slope).min(-1).max() > 0 for slope in slopes)


def test_smoothing_is_that_of_smoothed_targets():
  logits = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
  targets, weight = jnp.asarray(RNG.integers(0, 5, (2, 3))), jnp.asarray([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
  found = consistency.smoothed(sums.cross_entropy(logits, targets) * weight, logits, 0.1, weight)
  soft = optax.smooth_labels(jax.nn.one_hot(targets, 5), 0.1)
  np.testing.assert_allclose(found, optax.softmax_cross_entropy(logits, soft) * weight, rtol=1e-5)


class Drawing:
  """A model whose logits and losses of a layer are drawn with the key."""

  def apply(self, params, buffers, batch, key):
    logits = jax.random.normal(key, (*batch["targets"].shape, 7))
    of_layer = jax.random.uniform(fold(key, "layer"))
    return logits, {"decoder/01": Routed({"balance": (of_layer, jnp.float32(2))})}


class Routed:
  metrics, stats, log_prob = {}, {}, None

  def __init__(self, losses):
    self.losses = losses


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_the_objective_is_the_mean_of_both_losses_and_half_of_alpha_times_the_divergence(alpha):
  batch, key, model = toy_batch(), jax.random.key(3), Drawing()
  batch["targets"] = batch["targets"] % 7
  task = task_of(replaced(default_config(), {"train.consistency": alpha}))
  found = task.train_sums(model, {}, {}, batch, key)
  one, other = (model.apply({}, {}, batch, fold(key, name)) for name in ("one", "other"))
  weight = np.asarray(batch["weights"])
  at = np.asarray(batch["targets"])[..., None]
  nats = lambda logits: -np.take_along_axis(log_softmax(logits), at, -1)[..., 0]
  each = (nats(one[0]) + nats(other[0]) + alpha * symmetric_kl(one[0], other[0])) / 2
  want = (each * weight)[weight > 0].sum()
  np.testing.assert_allclose(found["loss"], (want, weight.sum()), rtol=1e-5)
  total, count = found["layers"]["decoder/01"]["losses"]["balance"]
  assert count == 4, "tokens of both passes"
  each = [routings["decoder/01"].losses["balance"][0] for _, routings in (one, other)]
  np.testing.assert_allclose(total, sum(each), rtol=1e-6)


@pytest.mark.parametrize("key, objective, model", [
    ("train.consistency", "contrastive", "limoe"), ("train.label_smoothing", "sigmoid", "vit")])
def test_what_has_no_softmax_over_values_is_refused(key, objective, model, monkeypatch):
  config = replaced(default_config(), {key: 0.5, "data.objective": objective, "model.name": model})
  monkeypatch.setattr("sparse_experts.tasks.check", lambda config: None)
  told = f"^{key}=0.5 is of a softmax over values, and data.objective='{objective}' has none; leave it out"
  with pytest.raises(UserError, match=told):
    validate(config)


@pytest.mark.parametrize("keys, why", [
    ({}, "router 'top_k' draws nothing"), ({"model__num_experts": 0}, "the model has no experts")])
def test_two_passes_that_are_the_same_are_refused(tmp_path, keys, why):
  told = f"train.consistency=1 compares two passes of each batch, but {why} and model.dropout=0"
  with pytest.raises(UserError, match=told):
    tiny_train(tmp_path, train__consistency=1.0, **QUICK | keys)
  assert not list(tmp_path.iterdir())


def logged(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("keys", [
    {"model__router__name": "random", "model__router__draw": "layer"}, {"model__dropout": 0.1},
    {"model__num_experts": 0, "model__dropout": 0.1}])
def test_a_run_makes_two_passes(tmp_path, keys):
  """With experts that are drawn, with dropout alone, and of a dense model: R-Drop."""
  rows = {}
  for alpha in (0.0, 5.0):
    tiny_train(tmp_path / str(alpha), train__consistency=alpha, **QUICK | keys)
    rows[alpha] = logged(tmp_path / str(alpha))
  flops = {alpha: of[0]["run"]["model_flops_per_step"] for alpha, of in rows.items()}
  losses = {alpha: [row["loss"] for row in of if "loss" in row] for alpha, of in rows.items()}
  assert flops[5.0] == 2 * flops[0.0] and losses[5.0] != losses[0.0]


@pytest.mark.slow
def test_the_loss_does_not_depend_on_mesh_or_accumulation(tmp_path):
  keys = QUICK | {"model__router__name": "random", "train__consistency": 5.0, "train__label_smoothing": 0.1}
  losses = []
  for n, place in enumerate((dict(), dict(mesh__data=2, mesh__expert=4))):
    tiny_train(tmp_path / str(n), **keys | place)
    losses += [row["loss"] for row in logged(tmp_path / str(n)) if "loss" in row]
  assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)  # sums over devices are rounded
