"""A dense student learns from a sparse run: the loss, what is copied, and that resuming changes nothing."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.config import default_config, replaced
from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.tasks import sums, task_of
from sparse_experts.tasks.text import TEACHER_LOGITS
from sparse_experts.training import distill
from sparse_experts.training.loop import train
from sparse_experts.validation import validate
from tests.training.tiny import documents, tiny_config, tiny_train
from tests.training.toy import ToyModel, toy_batch, toy_config

QUICK = dict(eval__train_windows=8, eval__min_bytes=200)
DENSE = dict(model__num_experts=0, model__num_layers=2)


def student(workdir, teacher, **keys):
  return tiny_train(workdir, distill__teacher=str(teacher), **DENSE | QUICK | keys)


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def mixed(logits, teacher, batch, weight):
  """The loss in numpy, float64: nats per target."""
  ours, theirs = (log_softmax(np.asarray(x, np.float64)) for x in (logits, teacher))
  hard = -np.take_along_axis(ours, np.asarray(batch["targets"])[..., None], -1)[..., 0]
  soft = -(np.exp(theirs) * ours).sum(-1)
  real = np.asarray(batch["weights"]) > 0
  return ((1 - weight) * hard + weight * soft)[real].sum() / real.sum()


@pytest.fixture(scope="module")
def of_toy():
  """(student's logits, batch with a teacher's, params, buffers) of the model of training's tests."""
  model, batch = ToyModel(), toy_batch()
  params, buffers = jax.jit(model.init)(jax.random.key(0))
  logits, _ = jax.jit(model.apply)(params, buffers, batch)
  teacher = 3 * np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)
  return logits, batch | {TEACHER_LOGITS: teacher}, params, buffers


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_loss_is_that_of_numpy(of_toy, weight):
  logits, batch, params, buffers = of_toy
  config = replaced(toy_config(), {"distill.weight": weight})
  loss = jax.jit(lambda *a: task_of(config).train_sums(ToyModel(), *a)["loss"])
  total, count = loss(params, buffers, batch)
  expected = mixed(logits, batch[TEACHER_LOGITS], batch, weight)
  assert float(total / count) == pytest.approx(expected, rel=1e-5)
  plain = {name: x for name, x in batch.items() if name != TEACHER_LOGITS}
  if not weight:
    assert float(total) == float(loss(params, buffers, plain)[0])
  else:
    assert float(total) != float(loss(params, buffers, plain)[0])


def test_the_gradient_is_the_students_alone(of_toy):
  """softmax(student) - softmax(teacher), and none for what the teacher says."""
  logits, batch, *_ = of_toy
  found = jax.grad(lambda s, t: sums.soft_cross_entropy(s, t).sum(), argnums=(0, 1))(
      logits, jnp.asarray(batch[TEACHER_LOGITS]))
  expected = jax.nn.softmax(logits) - jax.nn.softmax(batch[TEACHER_LOGITS])
  np.testing.assert_allclose(found[0], expected, atol=1e-6)
  assert not np.any(found[1])


@pytest.mark.slow
def test_a_student_starts_as_its_teacher_and_its_first_loss_is_as_expected(whole, tmp_path, capsys):
  teacher = whole[1]
  run = student(tmp_path, f"{whole[0]}@4", train__steps=1, train__eval_every=1, optimizer__learning_rate=0.0)
  theirs, ours = teacher.parameters(), run.parameters()
  shared = {name for name in ours if name in theirs}
  assert "decoder/00/ffn/w_in" in shared and "decoder/01/attention/query" in shared
  assert ours.keys() - theirs.keys() == {f"decoder/01/ffn/{w}" for w in ("w_in", "w_gate", "w_out")}
  for name in shared:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
  assert f"parameters from {whole[0]}@4" in capsys.readouterr().err
  dataset = run.dataset("train", documents())
  batch = {name: np.stack([dataset[i][name] for i in range(8)]) for name in dataset[0]}
  expected = mixed(run.model(batch)[0], teacher.model(batch)[0], batch, 0.25)
  first = rows(tmp_path)[0]
  assert first["loss"] == pytest.approx(expected, rel=1e-5)
  facts = first["run"]["teacher"]
  assert facts["step"] == 4 and facts["workdir"] == str(whole[0]) and len(facts["checkpoint"]) == 12


@pytest.mark.slow
def test_it_resumes_and_knows_its_teacher(whole, tmp_path):
  teacher = tmp_path / "teacher"
  shutil.copytree(whole[0], teacher)
  keys = dict(train__steps=4, optimizer__schedule="constant", train__accumulate=2)
  straight = student(tmp_path / "straight", teacher, **keys)
  student(tmp_path / "resumed", teacher, **keys | dict(train__steps=2))
  resumed = student(tmp_path / "resumed", teacher, **keys)
  for name, value in resumed.parameters().items():
    np.testing.assert_array_equal(value, straight.parameters()[name], err_msg=name)
  shutil.rmtree(teacher / "checkpoints/4")  # now the newest is another one
  with pytest.raises(UserError, match="distill.teacher=.* is now checkpoint .*, step 2, and .* learns from"):
    student(tmp_path / "resumed", teacher, **keys)


@pytest.mark.slow
def test_a_weight_of_zero_is_ordinary_training(whole, tmp_path):
  keys = dict(train__steps=3, **DENSE | QUICK)
  plain = tiny_train(tmp_path / "plain", **keys)
  run = student(tmp_path / "student", whole[0], distill__weight=0.0, distill__copy=False, **keys)
  for name, value in run.parameters().items():
    np.testing.assert_array_equal(value, plain.parameters()[name], err_msg=name)


@pytest.mark.slow
def test_a_mesh_changes_no_loss(whole, tmp_path):
  keys = dict(train__steps=2, train__batch_size=8)
  one = student(tmp_path / "one", whole[0], **keys)
  student(tmp_path / "mesh", whole[0], mesh__data=2, mesh__expert=2, mesh__model=2, **keys)
  losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("one", "mesh")]
  np.testing.assert_allclose(*losses, rtol=1e-5)  # sums in another order
  assert one.step == 2


@pytest.mark.slow
def test_what_cannot_be_distilled_is_named(whole, tmp_path):
  config = lambda **keys: tiny_config(**{"distill__teacher": str(whole[0])} | DENSE | keys)
  tokenizer = make_tokenizer("bytes")
  example = task_of(config()).example(tokenizer)

  class Other:
    name, fingerprint = "sentencepiece", "another"

  with pytest.raises(UserError, match="^distill.teacher=.* has another tokenizer; set data.tokenizer=byte"):
    distill.open_teacher(config(), Other(), example)
  with pytest.raises(UserError, match="^distill.teacher=nowhere: there is no folder nowhere; write DIR or"):
    distill.open_teacher(config(distill__teacher="nowhere"), tokenizer, example)
  with pytest.raises(UserError, match="^distill.teacher=.* is a decoder and reads positions, which a seq2"):
    distill.open_teacher(config(model__name="seq2seq"), tokenizer,
                         {name: x for name, x in example.items() if name != "positions"})
  with pytest.raises(UserError, match="^distill.teacher=.*: decoder/00/ffn/w_gate is .* there and .* here an"
                                      "d 2 more differ; give the student the teacher's widths outside exp"):
    train(config(model__mlp_dim=64, **QUICK), str(tmp_path), data=documents())


@pytest.mark.parametrize("keys, message", [
    ({"distill.weight": 0.5}, "distill.weight=0.5 is set, but distill.teacher names no run to learn from"),
    ({"distill.copy": False}, "distill.copy=False is set, but distill.teacher names no run"),
    ({"distill.teacher": "a", "distill.weight": 1.5}, "distill.weight=1.5 is out of range; choose 0 to 1"),
    ({"distill.teacher": "a", "init_from": "b"}, "init_from=b and distill.copy=True both say what to start"),
    ({"distill.teacher": "a", "model.name": "vit", "data.objective": "softmax"},
     "distill.teacher=a: a run on images cannot be distilled, only one on tokens; choose data.obj"),
])
def test_settings_that_cannot_be(keys, message):
  with pytest.raises(UserError, match=message):
    validate(replaced(default_config(), keys))
