"""Text classification as text-to-text: figures by hand, the ranking of labels, and which parameters train."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.analysis import prompted
from sparse_experts.config import replaced
from sparse_experts.data.labelled import datasets
from sparse_experts.tasks import ranking, task_of
from sparse_experts.training import evaluate
from sparse_experts.training.loop import train
from sparse_experts.training.run import load
from sparse_experts.training.selection import choose
from tests.analysis.tiny_run import tiny_run
from tests.training.tiny import tiny_config

LABELS = ("no", "not at all", "yes")
CLASSIFY = dict(data__objective="text_classification", data__length=32)
SEQ2SEQ = dict(model__name="seq2seq", data__target_length=16, model__decoder__num_experts=4)


def texts(number=24):
  """The first letter tells the label."""
  return [("abc"[i % 3] * (1 + i % 5) + str(i), LABELS[i % 3]) for i in range(number)]


def nats(logits, target):
  return math.log(sum(math.exp(x) for x in logits)) - logits[target]


def test_figures_by_hand():
  """Two texts and padding: an answer of two tokens of which one is wrong, and one that is right."""
  logits = [[[0.0, 9.0, 0.0], [2.0, 0.5, -1.0], [0.0, 1.0, 3.0]],
            [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [9.0, 0.0, 0.0]],
            [[np.nan] * 3] * 3]
  batch = {"targets": jnp.array([[0, 1, 2], [2, 1, 0], [0, 0, 0]]),
           "weights": jnp.array([[0.0, 1, 1], [0, 1, 0], [0, 0, 0]])}

  class Model:
    def apply(self, params, buffers, batch):
      return jnp.array(logits), {}

  task = task_of(tiny_config(**CLASSIFY))
  found = evaluate.report(task, jax.device_get(task.eval_sums(Model(), {}, {}, batch)))
  first = nats(logits[0][1], 1) + nats(logits[0][2], 2)
  second = nats(logits[1][1], 1)
  assert found == pytest.approx({"loss": (first + second) / 3, "nats_per_answer": (first + second) / 2,
                                 "exact_match": 0.5, "texts": 2})


def test_ranked_figures_by_hand(monkeypatch):
  """Three texts: right, right only per byte, wrong; the fourth row is padding."""
  scores = [[-1.0, -2.0, -3.0], [-3.0, -4.0, -9.0], [-5.0, -9.0, -1.0], [0.0, 0.0, 0.0]]
  monkeypatch.setattr(ranking, "log_likelihoods", lambda *_: jnp.array(scores))
  batch = {"label": jnp.array([0, 1, 0, 0]), "weights": jnp.array([[0.0, 1.0]] * 3 + [[0.0, 0.0]]),
           "answer_bytes": jnp.array([[2, 10, 3]] * 4)}
  found = evaluate.report(task_of(tiny_config(**CLASSIFY)), jax.device_get(
      ranking.sums(None, {}, {}, batch)) | {"nats_per_answer": (0.0, 3)})
  expected = sum(nats(row, label) for row, label in zip(scores[:3], (0, 1, 0)))
  assert found["accuracy"] == pytest.approx(1 / 3) and found["nats_per_label"] == pytest.approx(expected / 3)
  assert found["accuracy_per_byte"] == pytest.approx(1 / 3)  # -1/2, -2/10, -3/3: the first is wrong so


@pytest.mark.parametrize("keys", [
    {}, pytest.param(SEQ2SEQ, marks=pytest.mark.slow)], ids=["decoder", "seq2seq"])
def test_a_log_likelihood_is_that_of_the_whole_row(keys):
  """Of every label after the same prompt: the model's loss on a row that ends in that label."""
  run = tiny_run(**CLASSIFY, **keys)
  task = task_of(run.config)
  source = task.as_source(texts())
  dataset = task.make_dataset("valid", run.tokenizer, source)
  records = [dataset[i] for i in range(len(dataset))]
  assert len(records) == 3
  batch = {name: np.stack([r[name] for r in [*records, records[0]]]) for name in records[0]}
  model = run.abstract_model("dropless")
  found_BC = jax.jit(lambda *a: ranking.log_likelihoods(model, *a))(run.params, run.buffers, batch)
  rows = datasets.AnswerRows(run.config, run.tokenizer)
  answers = rows.answers(source.domains)
  prompts = [rows.prompts([text.encode()], 1)[0] for text, _ in texts()]
  by_text = {run.tokenizer.decode(prompt): prompt for prompt in prompts}
  for c, answer in enumerate(answers):
    own = []
    for r in records:
      ids = r["encoder_inputs"] if keys else r["decoder_inputs"]
      shown = run.tokenizer.decode(ids[ids > 2])
      prompt = by_text[shown[:shown.index("label:") + 6]]
      own.append(rows.record(prompt, answer, c))
    whole = {name: np.stack([r[name] for r in [*own, own[0]]]) for name in own[0]}
    logits, _ = run.model(whole)
    expected_B = -np.asarray(task.target_losses(logits, whole)).sum(-1)
    np.testing.assert_allclose(found_BC[:, c], expected_B, rtol=2e-5, atol=2e-5)  # rounding of another order


def test_a_router_without_cached_decoding_is_not_ranked():
  layer = lambda causality: SimpleNamespace(routing_causality=causality)
  layers = {"encoder/01": layer("batch"), "decoder/01": layer("self")}
  assert ranking.is_possible(SimpleNamespace(sparse_layers=layers))
  assert not ranking.is_possible(SimpleNamespace(sparse_layers=layers | {"decoder/03": layer("past")}))


ST_MOE = {  # section on fine-tuning: which parameters are updated
    "*": lambda name: True,
    "*,-*/experts/*,-*/router/*": lambda name: "/experts/" not in name and "/router/" not in name,
    "*/experts/*,*/router/*": lambda name: "/experts/" in name or "/router/" in name,
    "*/attention/*": lambda name: "/attention/" in name,
    "*/ffn/*": lambda name: "/ffn/" in name,
}


@pytest.mark.parametrize("only", ST_MOE)
def test_patterns_of_the_fine_tuning_study(only):
  names = tiny_run(**CLASSIFY).parameters()
  chosen = choose("train.only", only, names)
  assert chosen == {name for name in names if ST_MOE[only](name)} and 0 < len(chosen) <= len(names)


def labelled(config):
  return texts(120)


@pytest.mark.slow
def test_a_run_is_fine_tuned_and_its_labels_are_ranked(tmp_path):
  """From a language model; experts stay as they are, their optimizer's state is left out, and it resumes."""
  keys = dict(data__length=32, data__source="tests.tasks.test_labelled:labelled", eval__train_windows=16)
  pre = train(tiny_config(**keys | dict(train__steps=2, eval__min_bytes=200)), str(tmp_path / "pre"),
              data=[text.encode() for text, _ in texts(40)])
  tune = dict(init_from=str(tmp_path / "pre"), train__only="*,-*/experts/*",
              data__objective="text_classification", data__valid_share=0.2, model__expert_dropout=0.1,
              train__steps=80, train__eval_every=40, train__checkpoint_every=40)
  run = train(tiny_config(**keys | tune), str(tmp_path / "tuned"))
  before, after = pre.parameters(), run.parameters()
  for name, value in after.items():
    assert np.array_equal(value, before[name]) == ("/experts/" in name), name
  rows = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
  final = rows[-1]
  assert final["measure"] == (
      "nats_per_answer text_classification length=32 prompt='{text}\\nlabel:' texts=24")
  assert final["eval/final/accuracy"] == final["eval/final/exact_match"] == 1
  assert final["eval/final/nats_per_label"] < final["eval/final/nats_per_answer"] < math.log(3)
  assert final["eval/final/majority"] == pytest.approx(1 / 3)
  during = [row for row in rows if "eval/exact_match" in row]
  assert len(during) == 2 and "eval/accuracy" not in during[0]
  loaded = load(str(tmp_path / "tuned"), config=replaced(run.config, {
      "mesh.data": 2, "mesh.expert": 2, "mesh.model": 2}))
  numbers = evaluate.evaluate(loaded)
  assert numbers["accuracy"] == 1 and "capacity/accuracy" not in numbers
  for name in ("nats_per_label", "nats_per_answer"):  # on another mesh
    assert numbers[name] == pytest.approx(final[f"eval/final/{name}"], rel=1e-4)
  assert "accuracy 100.00% of ranked labels, the most frequent label has 33.33%" in evaluate.summary(
      task_of(loaded.config), numbers)


@pytest.mark.slow
def test_an_encoder_decoder_is_trained_on_masked_spans_and_then_on_labels(tmp_path):
  """And asked for labels before: the sentinel's place is the answer's."""
  keys = SEQ2SEQ | dict(
      data__length=32, data__source="tests.tasks.test_labelled:labelled", data__mean_span=3.0,
      model__group_size=32, model__decoder__group_size=16, eval__train_windows=16, data__valid_share=0.2,
      eval__min_bytes=200, train__steps=2)
  pre = train(tiny_config(**keys, data__objective="span_corruption"), str(tmp_path / "pre"),
              data=[text.encode() * 4 for text, _ in texts(60)])
  source = task_of(replaced(pre.config, {"data.objective": "text_classification"})).as_source(texts(40))
  found = prompted.prompted(pre, source, [0, 1])
  assert found["few_shot/texts"] == 9 and 0 <= found["few_shot/1/accuracy"] <= 1
  train(tiny_config(**keys, init_from=str(tmp_path / "pre"), data__objective="text_classification"),
        str(tmp_path / "tuned"))
  final = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()][-1]
  assert final["eval/final/texts"] == 24 and 0 <= final["eval/final/accuracy"] <= 1
