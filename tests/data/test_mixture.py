"""Several sources at their rates: record i is a fact, blocks hold exact shares, and each has its figure."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.config import default_config, from_json, replaced, to_json
from sparse_experts.config import mixture as names
from sparse_experts.data import make_tokenizer
from sparse_experts.data.text.mixture import Schedule, mix
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of
from sparse_experts.training import evaluate
from sparse_experts.training.loop import train
from sparse_experts.training.run import load
from tests.training.tiny import tiny_config

BYTES = make_tokenizer("bytes")


def upper(config):
  """Documents of two domains."""
  return [dict(text=f"{'ABCDE'[i % 5] * 40}{i}".encode(), domain=i % 2) for i in range(20)]


def lower(config):
  return [f"{'vwxyz'[i % 5] * 40}{i}".encode() for i in range(20)]


OWN = "mixture:big 0.75 tests.data.test_mixture:upper; small 0.25 tests.data.test_mixture:lower"


def config_of(source=OWN, objective="causal", **keys):
  c = default_config()
  c.data.update(dict(source=source, length=16, valid_share=0.3, objective=objective))
  return replaced(c, keys)


def datasets_of(config):
  task = task_of(config)
  source = task.open_source()
  return source, {split: task.make_dataset(split, BYTES, source) for split in ("train", "valid")}


@pytest.mark.parametrize("source, message", [
    ("mixture:", "'' is not NAME RATE SOURCE; write for example mixture:code 0.7 embedded; books 0.3 fi"),
    ("mixture:a 1", "'a 1' is not NAME RATE SOURCE"),
    ("mixture:a much embedded", "'a much embedded' is not NAME RATE SOURCE"),
    ("mixture:a nan embedded", "'a nan embedded' is not NAME RATE SOURCE"),
    ("mixture:a 0.5 embedded; b 0.4 embedded", "the rates sum to 0.9; make that 1"),
    ("mixture:a 0.5 embedded; a 0.5 embedded", "'a' is there twice; choose another name"),
    ("mixture:a 1 embedded; b 0 embedded", "b has rate 0; choose thousandths from 0.001 to 1"),
    ("mixture:a 0.3333 embedded; b 0.6667 embedded", "a has rate 0.3333; choose thousandths"),
    ("mixture:a 1.5 embedded; b -0.5 embedded", "a has rate 1.5; choose thousandths"),
    ("mixture:a/b 1 embedded", "'a/b' is no name for figures; choose letters and digits"),
    ("mixture:router 1 embedded", "'router' is no name for figures"),
    ("mixture:a 1 mixture:b 1 embedded", "'a' is a mixture itself; name its sources here"),
])
def test_what_is_no_mixture_is_named(source, message):
  with pytest.raises(UserError) as e:
    task_of(config_of(source)).check()
  assert str(e.value).startswith(f"data.source='{source}': {message}")


def test_names_rates_and_sources():
  """A path may have spaces."""
  found = names.parse("mixture: code 0.125 embedded;my-books 0.875 files:/my books/all ")
  assert found == {"code": (0.125, "embedded"), "my-books": (0.875, "files:/my books/all")}
  assert names.parse("embedded") == {} and names.sources("files:a b c") == []


def test_only_tasks_on_running_text_are_mixed():
  with pytest.raises(UserError, match="mixes texts, and this task is on labelled texts; choose one sour"):
    task_of(config_of(objective="text_classification")).check()


def test_a_schedule_is_exact_in_every_block_and_counts_each_component_up():
  rates = (0.7, 0.25, 0.05)
  schedule = Schedule(rates, seed=3)
  assert (schedule.block, schedule.counts) == (20, [14, 5, 1])
  of = [schedule(i) for i in range(200)]
  for start in range(0, 200, 20):
    assert np.bincount([c for c, _ in of[start:start + 20]], minlength=3).tolist() == schedule.counts
  for c in range(3):
    assert [n for component, n in of if component == c] == list(range(10 * schedule.counts[c]))
  backwards = Schedule(rates, seed=3)
  assert [backwards(i) for i in reversed(range(200))] == of[::-1]  # no state
  order = lambda seed: [Schedule(rates, seed)(i)[0] for i in range(200)]
  assert order(3) != order(4) and order(3)[:20] != order(3)[20:40]


@pytest.mark.parametrize("lengths", [(30, 100, 100), (100, 3, 100), (100, 100, 1), (0, 9, 9), (14, 5, 1)])
def test_a_list_ends_where_a_component_does(lengths):
  schedule = Schedule((0.7, 0.25, 0.05), seed=1)
  number = schedule.most(lengths)
  used = [schedule(i) for i in range(number)]
  assert all(n < lengths[c] for c, n in used)
  c, n = schedule(number)
  assert n == lengths[c]


@pytest.mark.parametrize("objective", ["causal", "span_corruption"])
def test_records_are_those_of_the_components(objective):
  config = config_of(objective=objective)
  if objective == "span_corruption":
    config = replaced(config, {"model.name": "seq2seq", "data.mean_span": 3.0})
  source, found = datasets_of(config)
  assert source.domains == ("big/0", "big/1", "small/0")
  for split, dataset in found.items():
    alone = []
    for name, (_, its) in names.parse(OWN).items():
      own = datasets_of(replaced(config, {"data.source": its}))[1][split]
      alone.append((name, own))
    schedule = Schedule((0.75, 0.25), config.train.seed if split == "train" else 1)
    for i in range(24 if split == "train" else len(dataset)):
      c, n = schedule(i)
      record, own = dict(dataset[i]), dict(alone[c][1][n])
      assert int(record.pop("component")) == c
      assert int(record.pop("domain")) == int(own.pop("domain")) + 2 * c
      assert record.keys() == own.keys()
      if split == "valid":
        np.testing.assert_array_equal(dataset.documents(i), 2 * alone[c][1].documents(n) + c)
      for key, value in own.items():
        np.testing.assert_array_equal(record[key], value)
    if split == "train":
      assert dataset.num_windows == sum(own.num_windows for _, own in alone)
  looks = lambda record: {name: (np.shape(a), np.asarray(a).dtype) for name, a in record.items()}
  assert looks(task_of(config).example(BYTES)) == looks(found["train"][0])


def test_the_seed_changes_the_training_stream_alone():
  one, other = (datasets_of(config_of(**{"train.seed": seed}))[1] for seed in (0, 1))
  components = lambda d, n: [int(d[i]["component"]) for i in range(n)]
  assert components(one["train"], 40) != components(other["train"], 40)
  assert components(one["valid"], len(one["valid"])) == components(other["valid"], len(other["valid"]))


def test_a_part_without_validation_records_is_named():
  empty = datasets_of(config_of())[1]["valid"]
  empty = type(empty)(empty.__getitem__, 0, 0)
  with pytest.raises(UserError, match="has no validation record of the component that is drawn first"):
    mix(config_of(), "valid", [empty, empty], [0.5, 0.5])


def test_each_source_has_its_figure_by_hand():
  logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
  targets = np.array([[1, 2, 3], [0, 4, 1], [2, 2, 0], [0, 0, 0]])
  in_bytes = np.array([[1, 2, 0], [3, 1, 1], [1, 0, 0], [0, 0, 0]])
  weights = np.array([[1.0, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]])
  batch = {"targets": targets, "weights": weights, "target_bytes": in_bytes,
           "component": np.array([0, 1, 0, 0])}

  class Model:
    def apply(self, params, buffers, batch):
      return jnp.array(logits), {}

  task = task_of(config_of())
  sums = jax.jit(lambda batch: task.eval_sums(Model(), {}, {}, batch))
  found = evaluate.report(task, jax.device_get(sums(batch)))
  nats = lambda r, p: math.log(np.exp(logits[r, p]).sum()) - logits[r, p, targets[r, p]]
  big = nats(0, 0) + nats(0, 1) + nats(2, 0)
  small = nats(1, 0) + nats(1, 1) + nats(1, 2)
  assert found["big/nats_per_byte"] == pytest.approx(big / 4, rel=1e-5)
  assert found["small/nats_per_byte"] == pytest.approx(small / 5, rel=1e-5)
  assert found["nats_per_byte"] == pytest.approx((big + small) / 9, rel=1e-5)
  assert "nats per byte of each source: big" in evaluate.summary(task, found | {
      "unigram_entropy": 1.0, "bigram_entropy": 1.0})
  assert task.measure(found) == "nats_per_byte causal length=16 mixture=big:0.75,small:0.25 target_bytes=9"


def test_code_that_a_saved_mixture_names_is_not_imported(tmp_path, monkeypatch):
  (tmp_path / "strangers.py").write_text("raise SystemExit('imported')\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  source = "mixture:a 0.5 strangers:read; b 0.5 embedded"
  config = from_json(to_json(config_of(source)), "their/config.json")
  with pytest.raises(UserError, match="^their/config.json names code outside the package, data.source='str"
                                      "angers:read', .*repeat it: --config.data.source='mixture:a 0.5"):
    task_of(config).open_source()


@pytest.mark.slow
def test_a_run_on_a_mixture_resumes_and_reports_each_source(tmp_path):
  keys = dict(data__source=OWN, data__length=16, data__valid_share=0.3, eval__min_bytes=200)
  straight = train(tiny_config(**keys), str(tmp_path / "straight"))
  train(tiny_config(**keys | dict(train__steps=2)), str(tmp_path / "resumed"))
  resumed = train(tiny_config(**keys), str(tmp_path / "resumed"))
  for name, value in resumed.parameters().items():
    np.testing.assert_array_equal(value, straight.parameters()[name])
  rows = [json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
  assert {"eval/big/nats_per_byte", "eval/small/nats_per_byte"} <= rows[1].keys()
  final = rows[-1]
  assert final["eval/final/big/nats_per_byte"] != final["eval/final/small/nats_per_byte"]
  run = load(str(tmp_path / "straight"))
  assert len(run.batch(["text of my own"])["segments"]) == 1
  mesh = load(str(tmp_path / "straight"), config=replaced(run.config, {"mesh.data": 2, "mesh.expert": 4}))
  numbers = evaluate.evaluate(mesh)
  assert numbers["big/nats_per_byte"] == pytest.approx(final["eval/final/big/nats_per_byte"], rel=1e-5)
