"""A task is one file and one line of a table: nobody else asks which task it is."""

import sys
import types
from typing import ClassVar

import jax
import numpy as np
import pytest

from sparse_experts import partitioning, tasks
from sparse_experts.config import default_config
from sparse_experts.data import Source
from sparse_experts.data.dataset import make_records
from sparse_experts.errors import UserError
from sparse_experts.tasks import TASKS, sums, task_of
from sparse_experts.tasks.task import Task
from sparse_experts.training import evaluate
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.run import Run
from sparse_experts.training.sample import sample
from sparse_experts.training.state import abstract_state, make_state
from sparse_experts.training.step import make_train_step
from tests.training.toy import ToyModel


class Parity(Task):
  """After each bit of a random row, whether the ones so far are odd: the walk of CONTRIBUTING.md."""

  models = ("decoder",)
  primary = "nats_per_answer"
  counts: ClassVar = {"answers": "nats_per_answer"}
  items = "parities"

  def stack_tokens(self):
    return {"decoder": ("data.length", self.config.data.length)}

  def open_source(self):
    bits_NL = np.random.default_rng(0).integers(2, size=(64, self.config.data.length), dtype=np.int32)
    return Source(bits_NL[:48], bits_NL[48:], (), f"parity {self.config.data.length}")

  def make_dataset(self, split, vocabulary, source):
    rows = source.part(split)
    record = lambda i, w: self._record(rows[w])
    return make_records(self.config, split, len(rows), record)

  def example(self, vocabulary):
    return self._record(np.zeros(self.config.data.length, np.int32))

  def _record(self, bits_L):
    one_L = np.ones_like(bits_L)
    return {"decoder_inputs": 1 + bits_L, "targets": 1 + bits_L.cumsum(dtype=np.int32) % 2,
            "weights": one_L.astype(np.float32), "segments": one_L,
            "positions": one_L.cumsum(dtype=np.int32) - 1}

  def train_sums(self, model, params, buffers, batch, key=None):
    logits_BLV, routings = model.apply(params, buffers, batch, key=key)
    ce_BL = sums.cross_entropy(logits_BLV, batch["targets"])
    return {"loss": sums.over(ce_BL, batch["weights"] > 0), "layers": sums.layer_sums(routings)}

  def eval_sums(self, model, params, buffers, batch):
    trained = self.train_sums(model, params, buffers, batch)
    return {"loss": trained["loss"], "nats_per_answer": trained["loss"]} | sums.flat(trained["layers"])

  def scored(self):
    return f"parity length={self.config.data.length}"

  def reads(self, vocab_size):
    return f"rows of {self.config.data.length} bits"


@pytest.fixture
def config(monkeypatch):
  monkeypatch.setitem(sys.modules, "sparse_experts.tasks.parity", types.SimpleNamespace(Parity=Parity))
  monkeypatch.setitem(TASKS, "parity", "parity:Parity")
  c = default_config()
  c.data.update(dict(objective="parity", length=8))
  c.train.update(dict(batch_size=8, steps=4))
  c.eval.update(dict(batch_size=12))
  return c


def test_a_new_task_trains_and_is_evaluated(config, monkeypatch):
  task, model = task_of(config), ToyModel()
  tasks.check(config)
  vocabulary, source = task.make_vocabulary(), task.open_source()
  train, valid = (task.make_dataset(split, vocabulary, source) for split in ("train", "valid"))
  assert task.row_lengths(vocabulary) == {"encoder": 0, "targets": 8}
  batch = {name: np.stack([train[i][name] for i in range(8)]) for name in task.example(vocabulary)}
  mesh, rule = partitioning.make_mesh(), make_optimizer(config, model.axes)
  with partitioning.use(mesh):
    state = make_state(model, rule, 0, abstract_state(model, rule, mesh, fsdp=False))
    state, metrics = jax.jit(make_train_step(model, rule, config))(state, batch, jax.random.key(0))
  assert metrics["loss"][1] == 8 * 8
  monkeypatch.setattr(ToyModel, "row_quantum", lambda model, record, shards: shards, raising=False)
  evaluator = evaluate.Evaluator(model, config, mesh, valid)
  numbers = evaluator(state.params, state.buffers, task.evaluated_records(valid))
  assert numbers["answers"] == 16 * 8 and numbers["nats_per_answer"] == numbers["loss"] > 0
  assert task.measure(numbers) == "nats_per_answer parity length=8 answers=128"
  first, *_ = evaluate.summary(task, numbers).splitlines()
  assert first == f"validation loss {numbers['loss']:.4f} nats per answer, dropless, on 128 answers"


def test_what_a_task_does_not_do_is_refused_in_its_words(config):
  with pytest.raises(UserError, match="^a run on parities .*data.objective='parity'.* writes no text; "):
    sample(Run(config, 0, None, None, None, None, ""), "x")
  config.model.name = "vit"
  with pytest.raises(UserError, match="^data.objective='parity' does not fit model.name='vit'; choose "
                                      "data.objective=softmax or sigmoid or another model$"):
    tasks.check(config)


@pytest.mark.parametrize("objective, measure", [
    ("causal", "nats_per_byte causal length=256 target_bytes="),
    ("span_corruption", "nats_per_byte span_corruption length=256 noise_density=0.15 target_bytes="),
    ("softmax", "nats_per_image softmax size=8 images="),
    ("sigmoid", "nats_per_image sigmoid size=8 images="),
    ("contrastive", "nats_per_pair contrastive size=8 of=32 pairs=")])
def test_what_a_figure_is_of(objective, measure):
  """As it stands in the metrics of finished runs, which are compared by it."""
  config = default_config()
  config.data.objective = objective
  task = task_of(config)
  assert task.measure(dict.fromkeys(task.counts, 7)) == f"{measure}7"
  asked = 1_000_000 if measure.endswith("bytes=") else 0
  assert task.measure() == f"{measure}{asked}"


def test_an_unknown_objective():
  config = default_config()
  config.data.objective = "casual"
  with pytest.raises(UserError, match="^data.objective='casual' is unknown; did you mean 'causal'"):
    task_of(config)
