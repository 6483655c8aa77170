"""Loss and measures of images by hand, and a run on digits from its first step to batch priority."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.analysis import calibration, probe, replay
from sparse_experts.config import default_config
from sparse_experts.errors import UserError
from sparse_experts.moe import Routing
from sparse_experts.tasks import sums, task_of
from sparse_experts.training import evaluate
from sparse_experts.training.loop import train
from sparse_experts.training.run import load
from sparse_experts.training.sample import sample

LOGITS = [[2.0, 0.5, -1.0], [0.0, 1.0, 0.0], [np.nan] * 3]
BATCH = {"images": jnp.zeros((3, 2, 2, 3)), "targets": jnp.array([[0, 2], [0, 0], [0, 0]]),
         "shares": jnp.array([[0.75, 0.25], [1.0, 0.0], [1.0, 0.0]]), "weights": jnp.array([1.0, 1.0, 0.0])}


class Model:
  """Logits that are written down; the third row is padding."""

  def apply(self, params, buffers, batch, key=None):
    learns = Routing(None, None, None, None, log_prob=jnp.full((3, 4), -1.0), value=jnp.zeros((3, 4)))
    return jnp.array(LOGITS), {"encoder/00": learns}


def log_softmax(logits, i):
  return logits[i] - math.log(sum(math.exp(x) for x in logits))


def binary(logits, target):
  """-log p of every class by itself; targets may be shares."""
  sigmoid = [1 / (1 + math.exp(-x)) for x in logits]
  return -sum(t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in zip(sigmoid, target))


LOSSES = {
    "softmax": [-0.75 * log_softmax(LOGITS[0], 0) - 0.25 * log_softmax(LOGITS[0], 2),
                -log_softmax(LOGITS[1], 0)],
    "sigmoid": [binary(LOGITS[0], [0.75, 0, 0.25]), binary(LOGITS[1], [1, 0, 0])]}


@pytest.mark.parametrize("objective", LOSSES)
def test_losses_and_measures_by_hand(objective):
  expected, config = sum(LOSSES[objective]), default_config()
  config.data.objective = objective
  task = task_of(config)
  found = evaluate.report(task, jax.device_get(task.eval_sums(Model(), {}, {}, BATCH)))
  assert found == pytest.approx(
      {"loss": expected / 2, "nats_per_image": expected / 2, "accuracy": 0.5, "images": 2})
  trained = task.train_sums(Model(), {}, {}, BATCH)
  assert [float(x) for x in trained["loss"]] == pytest.approx([expected, 2])
  # A router that learns from rewards: every token of an image is given minus its loss.
  policy, count = trained["layers"]["encoder/00"]["losses"]["policy"]
  assert (float(policy), int(count)) == (pytest.approx(-4 * expected), 8)


def test_the_head_starts_where_its_bias_says():
  """Sigmoid heads start at -log(classes), so that the first loss is near log(classes) + 1 and not V log 2."""
  logits_BV = jnp.full((1, 100), -math.log(100))
  loss = sums.sigmoid(logits_BV, jnp.array([[3]]), jnp.ones((1, 1)))
  assert float(loss[0]) == pytest.approx(math.log(100) + 100 * math.log1p(1 / 100))


def digits_config():
  c = default_config().unlock()
  c.model.update(dict(name="vit", num_layers=2, embed_dim=16, mlp_dim=16, num_heads=2, head_dim=8,
                      patch_size=4, activation="gelu", num_experts=4, group_size=20, capacity_factor=1.0,
                      eval_capacity_factor=1.0, capacity_rule="vmoe_paper", expert_init_scale=1.0))
  c.model.router.update(dict(name="v_moe", k=2))
  c.data.objective = "softmax"
  c.data.valid_share = 0.1
  c.optimizer.update(dict(schedule="constant", warmup_steps=2, learning_rate=1e-2))
  c.train.update(dict(steps=12, batch_size=16, log_every=6, eval_every=6, checkpoint_every=6))
  c.eval.update(dict(batch_size=32, train_windows=64))
  return c.lock()


@pytest.mark.slow
def test_a_run_on_digits(tmp_path):
  """Trains, resumes, evaluates at another capacity with batch priority, and says so."""
  config = digits_config()
  train(config, str(tmp_path))
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert rows[1]["loss"] < rows[0]["loss"] < math.log(10) * 1.3
  final = rows[-1]
  assert final["eval/final/images"] == 179 and final["measure"] == "nats_per_image softmax size=8 images=179"

  calibrated = calibration.calibrate(load(str(tmp_path))).report(20)
  assert (calibrated["targets"], calibrated["groups"]) == (179, 179)
  for name, of in (("nats", "nats_per_image"), ("accuracy", "accuracy")):
    assert calibrated[name] == pytest.approx(final[f"eval/final/{of}"], rel=1e-5)

  found = {}
  for order in ("choice", "batch_priority"):
    changed = config.copy_and_resolve_references().unlock()
    changed.model.eval_capacity_factor, changed.model.router.order = 0.5, order
    run = load(str(tmp_path), config=changed.lock())
    found[order] = evaluate.evaluate(run)
  for numbers in found.values():
    assert numbers["accuracy"] == pytest.approx(final["eval/final/accuracy"])
    assert numbers["capacity/router/encoder/01/dropped"] >= 0.5
  assert found["choice"]["capacity/nats_per_image"] != found["batch_priority"]["capacity/nats_per_image"]
  with pytest.raises(UserError, match="a run on images .*writes no text; measure it with evaluate"):
    sample(run, "x")
  with pytest.raises(UserError, match="the model reads images, and replay compares losses of tokens"):
    replay.replay(run, probe.probe(run, 2))
  words = evaluate.summary(task_of(run.config), found["choice"])
  for part in ("nats per image, accuracy", "on 179 images", "at the evaluation capacity"):
    assert part in words
