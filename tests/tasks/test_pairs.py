"""Loss and measures of pairs by hand, and a run on generated scenes."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.analysis import few_shot, probe, regret
from sparse_experts.config import default_config
from sparse_experts.data.feed import eval_batches
from sparse_experts.errors import UserError
from sparse_experts.tasks import sums, task_of
from sparse_experts.tasks.pairs import Contrastive
from sparse_experts.training import evaluate
from sparse_experts.training.loop import train
from sparse_experts.training.run import load
from sparse_experts.training.sample import sample
from sparse_experts.validation import validate
from tests.training.test_measures import undefined


def by_loops(logits, real):
  """(nats of each real pair, shares of images and of texts that find each other), of two Python loops."""
  pairs = [i for i in range(len(real)) if real[i]]
  nats, found = [], [0, 0]
  for i in pairs:
    nats.append(0.0)
    for direction, of in enumerate((lambda i, j: logits[i][j], lambda i, j: logits[j][i])):
      total, best = 0.0, None
      for j in pairs:
        total += math.exp(of(i, j))
        best = j if best is None or of(i, j) > of(i, best) else best
      nats[-1] -= 0.5 * (of(i, i) - math.log(total))
      found[direction] += best == i
  return nats, [n / len(pairs) for n in found]


@pytest.mark.parametrize("real", [[1] * 7, [1, 0, 1, 1, 0, 1, 1]])
def test_loss_and_measures_by_loops(real):
  logits = 3 * np.random.default_rng(17).normal(size=(7, 7))
  nats, (image_to_text, text_to_image) = by_loops(logits.tolist(), real)
  poisoned = np.where(np.outer(real, real), logits, np.nan)  # what is no pair may hold anything

  class Model:
    mask = staticmethod(lambda batch: None)

    def apply(self, params, buffers, batch, key=None):
      return jnp.asarray(poisoned, jnp.float32), {}

  batch = {"images": None, "texts": None, "weights": jnp.asarray(real, jnp.float32)}
  task = task_of(pairs_config())
  found = evaluate.report(task, jax.device_get(task.eval_sums(Model(), {}, {}, batch)))
  mean = sum(nats) / len(nats)
  assert found == pytest.approx({"loss": mean, "nats_per_pair": mean, "image_to_text": image_to_text,
                                 "text_to_image": text_to_image, "pairs": sum(real)}, rel=1e-5)
  assert 0 < image_to_text < text_to_image < 1
  loss = task.train_sums(Model(), {}, {}, batch)["loss"]
  np.testing.assert_allclose(loss, (sum(nats), len(nats)), rtol=1e-5)


def test_gradient_by_differences():
  logits = np.random.default_rng(1).normal(size=(4, 4))
  real = jnp.array([True, True, False, True])
  mean = lambda x: jnp.where(real, sums.contrastive(x, real), 0.0).sum() / 3
  got = jax.grad(mean)(jnp.asarray(logits, jnp.float32))
  for at in np.ndindex(4, 4):
    values = []
    for step in (1e-4, -1e-4):
      moved = logits.copy()
      moved[at] += step
      values.append(sum(by_loops(moved.tolist(), [1, 1, 0, 1])[0]) / 3)
    assert got[at] == pytest.approx((values[0] - values[1]) / 2e-4, abs=1e-5)


def pairs_config(**keys):
  """A tower of two layers, one sparse, on scenes of 8 x 8 pixels in four patches."""
  c = default_config().unlock()
  c.data.update(dict(objective="contrastive", tokenizer="words", length=12, valid_share=0.01))
  c.model.update(dict(name="limoe", pool="mean", num_layers=2, embed_dim=16, mlp_dim=16, num_heads=2,
                      head_dim=8, patch_size=4, activation="gelu", num_experts=4, capacity_factor=1.0,
                      eval_capacity_factor=1.0, capacity_rule="vmoe_paper", expert_init_scale=1.0))
  c.model.router.name = "limoe"
  c.model.group_size = 2 * (4 + 12)
  c.optimizer.update(dict(schedule="constant", warmup_steps=2, learning_rate=1e-2))
  c.train.update(dict(steps=6, batch_size=8, log_every=3, eval_every=3, checkpoint_every=3))
  c.eval.update(dict(batch_size=16, train_windows=32))
  for key, value in keys.items():
    *sections, name = key.split("__")
    section = c
    for s in sections:
      section = section[s]
    section[name] = value
  return c.lock()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("pairs"))
  compiled = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Contrastive, "train_sums", lambda *a, real=Contrastive.train_sums: (
        compiled.append(1), real(*a))[1])
    return workdir, train(pairs_config(), workdir), compiled


@pytest.mark.slow
def test_a_run_on_scenes(whole):
  """It trains, tells what docs/measures.md defines, and its step is traced once."""
  workdir, run, compiled = whole
  assert len(compiled) == 1
  with open(f"{workdir}/metrics.jsonl", encoding="utf-8") as f:
    rows = [json.loads(line) for line in f]
  assert rows[0]["loss"] < math.log(8) * 2 and not undefined(set().union(*rows))
  final, pairs = rows[-1], len(run.dataset("valid"))
  assert pairs % 16 == 0 and final["eval/final/pairs"] == pairs
  assert final["measure"] == f"nats_per_pair contrastive size=8 of=16 pairs={pairs}"
  assert 0 <= final["eval/final/image_to_text"] <= 1
  for m in (0, 1):
    assert f"router/encoder/01/global_entropy_{m}" in rows[0]


@pytest.mark.slow
def test_it_is_evaluated_on_any_mesh(whole):
  """What a pair is told from stays the same, also where groups and devices ask for more rows."""
  workdir, run, _ = whole
  expected = evaluate.evaluate(run)
  config = run.config.copy_and_resolve_references().unlock()
  config.mesh.update(dict(data=2, expert=4))
  config.eval.batch_size = 16
  config.model.group_size = 6 * (4 + 12)  # 48 rows for 8 devices
  other = load(workdir, config=config.lock())
  evaluator = evaluate.Evaluator(other.abstract_model(), other.config, other.mesh, other.dataset("valid"))
  found = evaluator(other.params, other.buffers, len(other.dataset("valid")))
  for name in ("nats_per_pair", "image_to_text", "text_to_image", "pairs"):
    assert found[name] == pytest.approx(expected[name], rel=1e-4), name
  assert expected["rerouting_cost"] == pytest.approx(
      expected["rerouted/nats_per_pair"] - expected["nats_per_pair"])
  assert not undefined(expected)
  words = evaluate.summary(task_of(run.config), expected)
  for part in ("nats per pair, ", "of images find their text", "the evaluation capacity", "rerouting cost"):
    assert part in words


@pytest.mark.slow
def test_a_batch_is_told_apart_as_the_model_says(whole):
  """Retrieval from `run.model`'s similarities, the first set of validation pairs."""
  _, run, _ = whole
  dataset = run.dataset("valid")
  batch = next(eval_batches(dataset, 16, partitioning.batch_sharding(run.mesh)))
  logits, _ = run.model(batch)
  assert logits.shape == (16, 16)
  evaluator = evaluate.Evaluator(run.abstract_model(), run.config, run.mesh, dataset)
  found = evaluator(run.params, run.buffers, 16)
  best = np.asarray(logits).argmax(1)
  assert found["image_to_text"] == (best == np.arange(16)).mean()


@pytest.mark.slow
def test_what_it_does_not_do(whole):
  _, run, _ = whole
  with pytest.raises(UserError, match=r"a run on pairs .*data.objective='contrastive'\) writes no text"):
    sample(run, "x")
  with pytest.raises(UserError, match="the loss of pairs .* is of a whole batch, .*; regret needs rows"):
    regret.regret(run, probe.probe(run, 2))
  with pytest.raises(UserError, match="few-shot evaluation is of images; .*model.name='vit'"):
    few_shot.features(run, [])


@pytest.mark.parametrize("keys, message", [
    (dict(train__batch_size=1), "train.batch_size=1 leaves a pair none to be told from; choose 2 or more"),
    (dict(eval__batch_size=1), "eval.batch_size=1 leaves a pair none to be told from; choose 2 or more"),
    (dict(train__accumulate=2), "train.accumulate=2 would compare the pairs of each micro-batch only, .*"),
    (dict(eval__train_windows=40), "eval.train_windows=40 does not divide by eval.batch_size=16; .*"),
    (dict(data__image__mixup=0.5), "data.image.mixup=0.5 blends classes, and pairs have none; choose 0"),
    (dict(model__pool="token"), "model.pool='token' reads a class token, but a limoe compares means .*"),
    (dict(model__group_size=7), r"model.group_size=7 does not divide the 128 tokens of a batch \(8 rows x "
                                r"image and text tokens=16\); choose .*"),
    (dict(model__name="vit"), "data.objective='contrastive' does not fit model.name='vit'; .*"),
    (dict(model__name="decoder"), "data.objective='contrastive' does not fit model.name='decoder'; .*"),
    (dict(data__objective="softmax"), "data.objective='softmax' does not fit model.name='limoe'; choose "
                                      "data.objective=contrastive or another model"),
    (dict(model__norm_eps=1e-5), "model.norm_eps=1e-05 is set, but model.name='limoe' does not use it; .*"),
])
def test_mistakes_are_named(keys, message):
  with pytest.raises(UserError, match=f"^{message}$"):
    validate(pairs_config(**keys))


def test_words_are_for_pairs():
  config = default_config().unlock()
  config.data.tokenizer = "words"
  with pytest.raises(UserError, match="^data.tokenizer='words' loses the spaces .*; choose bytes or .*"):
    validate(config)
