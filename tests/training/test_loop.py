"""A run in its work directory: what it writes, how it resumes, what it refuses."""

import json
import os
import re

import jax
import numpy as np
import pytest

from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.models import describe
from sparse_experts.tasks import task_of
from sparse_experts.training import workdir as wd
from sparse_experts.training.evaluate import Evaluator, evaluate, summary
from sparse_experts.training.loop import train
from sparse_experts.training.run import load
from sparse_experts.version import versions
from tests.training.tiny import documents, tiny_config, tiny_train


def _read(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _rows(workdir, leave_out=r"tokens_per_second|seconds_per_step|changed|run"):
  """metrics.jsonl without the clock."""
  return [{k: v for k, v in row.items() if not re.fullmatch(leave_out, k)} for row in _read(workdir)]


def _assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_what_a_run_writes(whole):
  workdir, run = whole
  assert {"config.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= set(os.listdir(workdir))
  assert list((workdir / "tensorboard").iterdir())
  rows = _rows(workdir)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 4] and run.step == 4
  raw = _read(workdir)[0]
  assert {"step", "loss", "learning_rate", "tokens_per_second", "seconds_per_step", "grad_norm",
          "aux_loss"} <= raw.keys()
  for name in ("load_max_mean", "dropped", "token_dropped", "entropy", "dead", "confidence", "load_balance"):
    assert f"router/decoder/01/{name}" in raw
  assert ["eval/nats_per_byte" in row for row in rows] == [False, True, False, True, False]
  *_, last, final = rows
  assert final["eval/final/target_bytes"] >= 900
  assert final["eval/final/unigram_entropy"] > final["eval/final/bigram_entropy"] > 0
  assert final["data_fingerprint"] == run.data_fingerprint
  assert final["measure"] == f"nats_per_byte causal length=32 target_bytes={final['eval/final/target_bytes']}"
  assert last["learning_rate"] == pytest.approx(1e-2) and rows[0]["learning_rate"] == pytest.approx(5e-3)
  assert last["loss"] < rows[0]["loss"]


def test_the_first_row_of_a_process_says_what_ran(whole):
  workdir, run = whole
  first, *others = _read(workdir)
  sizes = describe(run.config, run.tokenizer.vocab_size)
  assert first["run"] == {
      **versions(), "device": "cpu", "devices": 1, "processes": 1, "tokens_per_step": 8 * 32,
      "model_flops_per_step": 3 * sizes["flops_per_token"] * 8 * 32, "params_total": sizes["params_total"],
      "params_active": sizes["params_active"], "layers": {"decoder/01": {"experts": 8, "k": 1}},
      "data_fingerprint": run.data_fingerprint}
  assert not any("run" in row for row in others)
  for row in (first, *others[:-1]):  # the last one holds the final figure alone
    load = row["router/decoder/01/load"]
    assert len(load) == 8 and sum(load) == pytest.approx(1, abs=1e-3)
    assert 8 * max(load) == pytest.approx(row["router/decoder/01/load_max_mean"], rel=1e-3)


def test_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, capsys):
  """Also where the log holds lines of steps that are done again, the last one cut off by a kill."""
  tiny_train(tmp_path, train__steps=2)
  with (tmp_path / "metrics.jsonl").open("a") as f:
    f.write('{"step": 3, "loss": 0.0}\n{"step": 4, "lo')
  run = tiny_train(tmp_path)
  assert "resuming" in capsys.readouterr().err
  _assert_same_bits(run.params, whole[1].params)
  but = r"tokens_per_second|seconds_per_step|changed|run|.*/dead"
  half = [row for row in _rows(tmp_path, but) if "measure" not in row or row["step"] == 4]
  assert half == _rows(whole[0], but)
  assert [row.get("changed") for row in _read(tmp_path)] == [None] * 3 + [{"train.steps": [2, 4]}, None, None]
  assert ["run" in row for row in _read(tmp_path)] == [True, False, False, True, False, False]


def test_a_finished_run_is_left_alone(whole, capsys):
  before = (whole[0] / "metrics.jsonl").read_bytes()
  run = tiny_train(whole[0])
  assert "already finished: step 4 of 4" in capsys.readouterr().err
  assert (whole[0] / "metrics.jsonl").read_bytes() == before
  _assert_same_bits(run.params, whole[1].params)


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4)], ids=["1x8", "2x4"])
def test_a_checkpoint_serves_any_mesh(whole, mesh):
  config = tiny_config(mesh__data=mesh[0], mesh__expert=mesh[1])
  run = load(str(whole[0]), config=config)
  assert {x.sharding.num_devices for x in jax.tree.leaves(run.params)} == {8}
  evaluator = Evaluator(run.abstract_model(), config, run.mesh, run.dataset("valid", documents()))
  found = evaluator(run.params, run.buffers, config.eval.train_windows)
  last = _rows(whole[0])[-2]
  # sums in another order
  assert found["nats_per_byte"] == pytest.approx(last["eval/nats_per_byte"], rel=1e-5)


@pytest.mark.slow  # of one update test_step.py shows it, of a run on 2x4 test_golden.py
@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, 8, 1), (8, 1, 1), (2, 2, 2)], ids=str)
def test_a_run_on_a_mesh_logs_the_same_losses(whole, tmp_path, mesh):
  keys = {f"mesh__{k}": n for k, n in zip(("data", "expert", "model"), mesh, strict=True)}
  if mesh == (2, 4, 1):  # four slices of two: devices in another order
    keys |= dict(mesh__dcn__data=2, mesh__dcn__expert=2)
  tiny_train(tmp_path, **keys, eval__train_windows=8, eval__min_bytes=200)
  for a, b in zip(_rows(whole[0])[:-1], _rows(tmp_path)[:-1], strict=True):
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["router/decoder/01/dropped"] == b["router/decoder/01/dropped"]


def test_the_mesh_may_change_when_a_run_is_resumed(whole):
  changed = wd.claim(str(whole[0]), tiny_config(mesh__data=4, mesh__dcn__data=2))
  assert changed == {"given.data": ["list", None], "mesh.data": [1, 4], "mesh.dcn.data": [1, 2]}


def test_more_checkpoints_may_be_kept_when_a_run_is_resumed(whole):
  assert wd.claim(str(whole[0]), tiny_config(train__keep_checkpoints=9))["train.keep_checkpoints"] == [3, 9]


@pytest.mark.slow  # test_step.py shows it of one update
def test_accumulated_steps_log_the_same_numbers(whole, tmp_path):
  """Two micro-batches in whole routing groups; top-1 choices and drops are those of one batch."""
  tiny_train(tmp_path, train__accumulate=2, train__steps=2, eval__train_windows=8, eval__min_bytes=200)
  for a, b in zip(_rows(whole[0])[:2], _rows(tmp_path)[:2], strict=True):
    for name in ("loss", "aux_loss", "grad_norm", *(f"router/decoder/01/{n}" for n in ("z", "dropped"))):
      assert a[name] == pytest.approx(b[name], rel=1e-5)  # sums in another order


def test_the_figure_does_not_depend_on_the_batch(whole):
  """Batches of 8 windows, the last one padded, and of 5."""
  workdir, _ = whole
  run = load(str(workdir), config=tiny_config(eval__batch_size=5))
  found = evaluate(run, run.dataset("valid", documents()))
  final = "eval/final/"
  last = {k.removeprefix(final): v for k, v in _rows(workdir)[-1].items() if k.startswith(final)}
  assert {k: found[k] for k in last} == pytest.approx(last, rel=1e-6)
  cost = found["rerouted/nats_per_byte"] - found["nats_per_byte"]
  assert found["rerouting_cost"] == pytest.approx(cost) != 0
  assert found["capacity/router/decoder/01/dropped"] > found["router/decoder/01/dropped"] == 0
  text = summary(task_of(run.config), found)
  assert "rerouting cost" in text and "unigram entropy of the same targets" in text


def test_a_loaded_run_answers(whole):
  run = load(str(whole[0]), step=2)
  assert run.step == 2
  dataset = run.dataset("valid", documents())
  batch = {k: np.stack([dataset[i][k] for i in range(2)]) for k in dataset[0]}
  logits, routings = run.model(batch, trace=True)
  assert logits.shape == (2, 32, run.tokenizer.vocab_size)
  assert routings["decoder/01"].expert is not None and bool(routings["decoder/01"].kept.all())
  assert run.model(batch)[1]["decoder/01"].expert is None


@pytest.mark.parametrize("keys, message", [
    (dict(optimizer__learning_rate=1.0, train__seed=3),
     r"another config: optimizer.learning_rate=0.01 there and 1.0 here, train.seed=0 there and 3 here; ch"),
    (dict(model__num_experts=4), r"num_experts=8 there and 4 here; choose another workdir, or set it back"),
    (dict(mesh__model=2, mesh__expert=8), r"needs 16 devices, but there are 8; .* JAX_NUM_CPU_DEVICES=16"),
    (dict(mesh__expert=3), r"does not divide"),
    (dict(optimizer__name="adam"), r"did you mean 'adamw'"),
])
def test_configs_that_a_workdir_refuses(whole, keys, message):
  with pytest.raises(UserError, match=message) as caught:
    tiny_train(whole[0], **keys)
  assert "\n" not in str(caught.value)


def test_other_data_and_other_lengths_of_a_bound_schedule_are_refused(whole, tmp_path):
  with pytest.raises(UserError, match="fingerprint .* choose another workdir"):
    train(tiny_config(train__steps=6), str(whole[0]), data=documents(seed=1))
  assert json.loads((whole[0] / "config.json").read_text())["train"]["steps"] == 4  # as it was
  wd.keep(str(tmp_path), tiny_config(optimizer__schedule="cosine"), make_tokenizer("bytes"))
  with pytest.raises(UserError, match=r"train.steps=4 there and 9 here, but .*'cosine'"):
    wd.claim(str(tmp_path), tiny_config(optimizer__schedule="cosine", train__steps=9))


def test_workdirs_that_are_none(tmp_path, monkeypatch):
  file = tmp_path / "file"
  file.write_text("")
  claim = lambda path: wd.claim(str(path), tiny_config())
  with pytest.raises(UserError, match="is a file; name a folder"):
    claim(file)
  with pytest.raises(UserError, match="cannot be made"):
    claim(file / "below")
  with pytest.raises(UserError, match="has no config.json"):
    load(str(tmp_path))
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  with pytest.raises(UserError, match="has checkpoints but no config.json"):
    claim(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="is not a config"):
    claim(tmp_path)
  monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
  with pytest.raises(UserError, match="cannot be written"):
    claim(tmp_path)


def test_missing_checkpoints_are_named(whole, tmp_path):
  with pytest.raises(UserError, match=re.escape("has no step 3; choose from 2, 4")):
    load(str(whole[0]), step=3)
  wd.keep(str(tmp_path), tiny_config(), make_tokenizer("bytes"))
  with pytest.raises(UserError, match="holds no checkpoint"):
    load(str(tmp_path))
  (tmp_path / "tokenizer.model").unlink()
  with pytest.raises(UserError, match="has no tokenizer.model"):
    load(str(tmp_path))
