"""docs/measures.md defines every number that comes out, names tests that exist, and is what is computed."""

import functools
import json
import math
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import cli
from sparse_experts.analysis import compare, replay
from sparse_experts.aot import cost
from sparse_experts.moe import Routing
from sparse_experts.tasks import task_of
from sparse_experts.tasks.text import Text
from sparse_experts.training import evaluate, metrics, objectives
from sparse_experts.training.log import Log
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.run import load
from sparse_experts.training.state import TrainState
from sparse_experts.training.step import make_train_step
from tests.aot.test_aot import V5E, program_by_hand
from tests.training.tiny import documents, tiny_config
from tests.training.toy import ToyModel, toy_batch, toy_config

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/measures.md").read_text()
ENTRIES = dict(re.findall(r"^### (.*)\n((?:(?!#).*\n?)*)", PAGE, re.MULTILINE))
DEFINED = {name for title in ENTRIES for name in re.findall(r"`([^`]+)`", title)}
LABELS = {"name", "kind", "dispatch", "causality",
          "match/measure", "match/to", "match/equal", "match/overrides"}
PHASES = "forward|recomputed|backward|update"


def undefined(keys):
  """Those without an entry; prefixes, names of layers and of parts are those of the page's introduction."""
  def entry(key):
    key = re.sub(r"^(eval/final/|eval/|capacity/|rerouted/)", "", key).removesuffix("_quartiles")
    key = re.sub(r"^router/(encoder|decoder)/\d+/(attention/)?", "router/<layer>/", key)
    key = re.sub(r"^(flops|executed_flops)/.*", r"\1/<part>", key)
    key = re.sub(r"/(local|global)_entropy_\d+$", r"/\1_entropy_<m>", key)
    return re.sub(rf"^(collectives|per_sparse_layer)/[\w-]+(/({PHASES})(?=/))?", r"\1/<kind>", key)

  return {key for key in keys if entry(key) not in DEFINED}


def test_every_number_that_a_run_logs(whole):
  rows = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
  keys = set().union(*rows)
  assert len(keys) > 30 and not undefined(keys)


def test_every_number_that_evaluate_gives(whole):
  run = load(str(whole[0]))
  found = evaluate.evaluate(run, run.dataset("valid", documents()))
  assert len(found) > 20 and not undefined(found)


def test_every_number_that_describe_gives(capsys):
  assert cli.main(["describe", "--config=configs/smoke.py", "--match=params", "--to=configs/smoke.py:dense",
                   "--json"]) == 0
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  keys = {key for layer in found.pop("layers") for key in layer}
  keys = {f"layers/{key}" for key in keys - LABELS}
  for name, value in found.items():
    keys |= {f"{name}/{key}" for key in value} if isinstance(value, dict) else {name}
  assert len(keys) > 20 and not undefined(keys - LABELS)


def test_every_number_that_compare_gives():
  found = compare.as_json(*(compare.Group(name, {}) for name in "ab"))
  assert set(found) == {"a", "b", "difference"}
  assert not undefined({*found["a"], *found["b"], *found["difference"]})


def test_every_number_that_compile_gives():
  found = cost.summary(program_by_hand(), V5E)
  keys = set()
  for name, value in found.items():
    keys |= {f"{name}/{path}" for path in flat(value)} if isinstance(value, dict) else {name}
  assert len(keys) > 30 and not undefined(keys)


def flat(tree):
  """Paths of the leaves of nested dictionaries."""
  for name, value in tree.items():
    yield from (f"{name}/{path}" for path in flat(value)) if isinstance(value, dict) else (name,)


def test_a_number_without_an_entry_is_noticed():
  assert undefined({"eval/final/router/decoder/01/mood", "loss", "flops/ffn"}) == {
      "eval/final/router/decoder/01/mood"}


@pytest.mark.parametrize("title", ENTRIES)
def test_an_entry_names_its_file_and_tests_that_exist(title):
  computed, tests = re.search(r"^Computed in (.*?)\. Test: (.*)$", ENTRIES[title], re.MULTILINE).groups()
  assert len(re.findall(r"^### ", PAGE, re.MULTILINE)) == len(ENTRIES)  # none twice
  for path in re.findall(r"`([^`]+)`", computed):
    assert (ROOT / ("" if path.startswith("experiments/") else "sparse_experts") / path).is_file()
  for name in re.findall(r"`([^`]+)`", tests):
    path, test = name.split("::")
    assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE), name


def nats(logits, target):
  """-log softmax, for one target."""
  top = max(logits)
  return top + math.log(sum(math.exp(x - top) for x in logits)) - logits[target]


def test_evaluation_by_hand():
  """A model whose logits are written down: a target of a byte, a mark, three bytes of weight 2, padding."""
  logits = [[[2.0, 0.5, -1.0], [0.0, 1.0, 0.0], [3.0, 3.0, -2.0], [np.nan] * 3]]
  targets, weights, in_bytes = [[0, 2, 1, 0]], [[1.0, 1.0, 2.0, 0.0]], [[1, 0, 3, 0]]
  batch = {"targets": jnp.array(targets), "weights": jnp.array(weights), "target_bytes": jnp.array(in_bytes)}

  class Model:
    def apply(self, params, buffers, batch):
      return jnp.array(logits), {}

  task = task_of(tiny_config())
  found = evaluate.report(task, jax.device_get(task.eval_sums(Model(), {}, {}, batch)))
  a, mark, c = (nats(logits[0][i], targets[0][i]) for i in range(3))
  assert found == pytest.approx({
      "nats_per_byte": (a + c) / 4, "nats_per_target": (a + c) / 2, "nats_per_mark": mark,
      "loss": (a + mark + 2 * c) / 4, "target_bytes": 4, "targets": 2}, rel=1e-6)


@pytest.mark.parametrize("router", [object(), None], ids=["router", "no_list"])
def test_rerouting_cost_by_hand(monkeypatch, router):
  """What is subtracted from what, and of which models; not there where a layer assigns no token."""
  figures = {"dropless": 1.5, "eval_capacity": 1.75, "rerouted": 4.0}

  class Run:
    config, mesh, params, buffers, step = tiny_config(), None, None, None, 7

    def abstract_model(self, kind):
      return type("Model", (), {"kind": kind, "sparse_layers": {
          "decoder/00": SimpleNamespace(router=object()), "decoder/01": SimpleNamespace(router=router)}})

  class Dataset:
    num_windows = 3

    def __getitem__(self, i):
      return {"target_bytes": np.ones(1)}

  def evaluator(model, config, mesh, dataset):
    found = {"nats_per_byte": figures[model.kind], "router/decoder/01/dead": 1}
    return lambda *_, final: found

  monkeypatch.setattr(evaluate, "Evaluator", evaluator)
  monkeypatch.setattr(Text, "baselines", lambda task, dataset, records: {})
  found = evaluate.evaluate(Run(), Dataset())
  rerouted = {"rerouted/nats_per_byte": 4.0, "rerouting_cost": 2.5} if router else {}
  assert found == {
      "nats_per_byte": 1.5, "router/decoder/01/dead": 1, "capacity/nats_per_byte": 1.75,
      "capacity/router/decoder/01/dead": 1, **rerouted, "step": 7, "windows": 3}


def test_interval_by_hand():
  """Of batches of one size the t-interval of their means; of unequal ones the ratio's, not the mean's."""
  low, high = evaluate.interval([(2.0, 2.0), (4.0, 2.0), (6.0, 2.0)])
  half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2), deviation 1
  assert (low, high) == pytest.approx((2 - half, 2 + half))
  low, high = evaluate.interval([(1.0, 1.0), (9.0, 3.0)])  # 10 / 4; both are 1.5 from 2.5 times their count
  assert (low + high) / 2 == pytest.approx(2.5)
  assert (high - low) / 2 == pytest.approx(12.706204736174698 * math.sqrt(2 * 2 * 1.5**2) / 4)
  assert evaluate.interval([(1.0, 1.0)]) is None


@pytest.mark.slow
def test_a_quick_evaluation_is_a_sample_of_the_whole(whole, monkeypatch):
  run = load(str(whole[0]))
  data = run.dataset("valid", documents())
  monkeypatch.setattr(evaluate, "QUICK_BYTES", 400)
  found, all_of_it = evaluate.quick(run, data), evaluate.evaluate(run, data)
  assert not undefined(found) and 400 <= found["target_bytes"] < all_of_it["target_bytes"]
  low, high = found["interval"]
  assert low < all_of_it["nats_per_byte"] < high
  said = evaluate.summary(task_of(run.config), found)
  assert "95% interval" in said and "dead experts on validation data: decoder/01 " in said


def test_agreement_by_hand():
  """Two groups of 2 tokens, K = 2: the same set in another order, another expert, a skip, and padding."""
  lists = lambda experts, valid: Routing(
      token=jnp.array([[0, 1, 0, 1], [0, 1, 0, 1]]), expert=jnp.array(experts), gate=jnp.ones((2, 4)),
      valid=jnp.array(valid, bool))
  before = lists([[0, 1, 2, 3], [0, 1, 2, 3]], [[1, 1, 1, 1], [1, 0, 1, 0]])
  after = lists([[2, 1, 0, 0], [0, 2, 2, 2]], [[1, 1, 1, 1], [1, 0, 0, 0]])
  layer = SimpleNamespace(group_length=lambda total: 2, num_experts=4, num_heads=1)
  same, real = replay._agreement(before, after, jnp.array([[True, True], [True, False]]), layer)
  assert (same, real) == (1, 3)


def test_grad_norm_and_skipped_by_hand():
  """Before clipping; of a step with NaN in it, nothing but that it was skipped."""
  model, config, batch = ToyModel(), toy_config(), toy_batch()
  with config.unlocked():
    config.optimizer.clip_norm = 1e-3
  params, buffers = jax.jit(model.init)(jax.random.key(0))
  weights = objectives.loss_weights(model)

  @jax.jit
  @jax.grad
  def gradient(params):
    sums = task_of(config).train_sums(model, params, buffers, batch)
    return objectives.total(sums, objectives.whole(sums), weights, objectives.layer_losses(model, config))[0]

  squares = [(np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(gradient(params))]
  rule = make_optimizer(config, model.axes)
  state = TrainState(step=jnp.zeros((), jnp.int32), params=params, buffers=buffers,
                     opt_state=jax.jit(rule.init)(params))
  step = jax.jit(make_train_step(model, rule, config))
  _, found = step(state, batch, jax.random.key(0))
  np.testing.assert_allclose(found["grad_norm"], (math.sqrt(sum(squares)), 1), rtol=1e-5)
  assert found["skipped"][0] == 0
  head = params["head"].at[0, 0].set(jnp.nan)
  _, found = step(state.replace(params={**params, "head": head}), batch, jax.random.key(0))
  assert found.pop("skipped") == (1, 1)
  assert metrics.reduce(jax.device_get(found)) == {}


def test_a_row_by_hand(tmp_path, monkeypatch):
  """Two steps of 3 s together, 5 s of evaluation between them; one of four further steps was skipped."""
  clock = iter([0.0, 100.0, 101.0, 106.0, 108.0, 120.0])
  monkeypatch.setattr(metrics.time, "perf_counter", functools.partial(next, clock))
  log = Log(str(tmp_path), tiny_config(optimizer__warmup_steps=0), 0, {},
            {"tokens_per_step": 256, "layers": {}})
  pairs = lambda loss, skipped=0.0: {"loss": (loss, 2.0), "skipped": (skipped, 1.0)}
  with log.compiling():
    pass
  log.add(pairs(4.0))
  with log.pause(None):
    pass
  log.add(pairs(8.0))
  assert log.interval() == {"loss": 3.0, "learning_rate": pytest.approx(1e-2), "seconds_per_step": 1.5,
                            "tokens_per_second": 256 / 1.5}
  for i in range(4):
    log.add(pairs(4.0, skipped=float(i == 2)))
  row = log.interval()
  assert (row["skipped"], row["seconds_per_step"]) == (1, 3.0)
  log.close()
