"""What a gap is, which arms there are, and the command on two of them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.routers_side_by_side import __main__ as command
from experiments.routers_side_by_side import report
from experiments.routers_side_by_side.arms import (
    ARMS,
    DENSE,
    ORACLE,
    RANDOM,
    SEEDS,
    SWITCH,
    TUNING_SEED,
    arms,
)
from experiments.routers_side_by_side.train import Program, Setting, agreement
from sparse_experts import config
from sparse_experts.cli import sweep as sweeps
from sparse_experts.models import build


def test_every_router_and_layer_has_an_arm():
  known = {*config.ROUTERS, *config.LAYERS}
  assert {name for name, _ in ARMS.values()} == known | {DENSE}
  assert arms([*config.ROUTERS, "new"]).keys() - arms(config.ROUTERS).keys() == {"new"}
  assert len(ARMS) == len(known) + 2  # dense, and top_k twice
  assert ORACLE in ARMS and RANDOM in ARMS and SWITCH in ARMS and TUNING_SEED not in SEEDS


def row(loss):
  return {"loss": loss, "rate": 0.01}


def test_a_gap_is_paired_and_leaves_out_what_diverged():
  oracle, random = {0: row(1.0), 1: row(2.0), 2: row(1.0)}, {0: row(3.0), 1: row(3.0), 2: row(3.0)}
  arm = {0: row(2.0), 1: row(2.25), 2: row(None)}
  assert report.gaps(arm, oracle, random) == {0: 0.5, 1: 0.25}
  assert set(report.gaps(oracle, oracle, random).values()) == {0.0}
  assert set(report.gaps(random, oracle, random).values()) == {1.0}
  assert report.control(oracle, random).mean == pytest.approx(5 / 3)


def test_the_rate_with_the_lowest_loss_is_taken():
  tried = [dict(loss=loss, rate=rate) for rate, loss in ((0.3, None), (0.1, 2.0), (0.01, 1.0), (0.03, 1.0))]
  assert report.best_rate(tried) == 0.01
  assert report.best_rate(tried[:1]) == 0.3


@pytest.mark.parametrize("count_NE, expected", [
    (np.eye(4), 1.0),
    (np.ones((4, 4)), 0.0),
    (np.eye(4)[:, [0, 0, 1, 1, 2, 2, 3, 3]], 1.0),  # two experts for each cluster
    (np.repeat(np.eye(2), 2, axis=0), 0.5),  # two clusters for each expert: log 2 of log 4
], ids=["own", "shared", "split", "pairs"])
def test_agreement(count_NE, expected):
  assert float(agreement(jnp.asarray(count_NE))) == pytest.approx(expected, abs=1e-6)  # float32


def test_another_setting_or_argument_is_another_key():
  heavier = "top_k", dict(load_balance_weight=0.02)
  keys = [Program(setting, *arm).key for setting, arm in (
      (Setting(), ARMS[SWITCH]), (Setting(), ARMS[SWITCH]), (Setting(steps=1), ARMS[SWITCH]),
      (Setting(), heavier))]
  assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.slow
def test_two_arms_end_to_end_and_again(tmp_path, capsys, monkeypatch):
  """Interrupted before its last run; then only that one is trained."""
  out, calls, run = tmp_path / "out", [], Program.run

  def stop(self, *args):
    calls.append(args)
    if len(calls) == 6:
      raise KeyboardInterrupt
    return run(self, *args)

  monkeypatch.setattr(Program, "run", stop)
  argv = ["--quick", f"--out={out}"]
  assert command.main(argv) == 130
  assert len(json.loads((out / "results.json").read_text())) == 6  # five runs, one arm's step time
  assert command.main(argv) == 0
  assert len(calls) == 7 and calls[5] == calls[6]
  printed = capsys.readouterr().out
  assert "2 arms x (1 rates + 2 seeds) = 6 runs" in printed and printed.count("in results.json") == 5
  lines = [line.split("|") for line in (out / "table.md").read_text().splitlines() if line.startswith("| ")]
  header, *cells = ([cell.strip() for cell in line[1:-1]] for line in lines)
  found = {row[0]: dict(zip(header, row, strict=True)) for row in cells}
  assert found[ORACLE]["oracle gap"] == "0.000" and found[RANDOM]["oracle gap"] == "1.000"
  assert found[ORACLE]["agreement"] == "1.00" and float(found[RANDOM]["agreement"]) < 0.2
  assert float(found[ORACLE]["nats"]) < float(found[RANDOM]["nats"])  # after 30 steps
  assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_arm_is_one_line(tmp_path, capsys):
  assert command.main(["--only=topk", f"--out={tmp_path}"]) == 2
  assert "there is no arm 'topk'; did you mean 'top_k'?" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["sweep_spans.py", "sweep_causal.py"])
def test_the_arms_on_books_may_be_trained(file):
  """A causal model refuses routers that look ahead; this is where it would. No data is read."""
  sweep = sweeps.load(f"experiments/routers_side_by_side/{file}")
  for name, arm in sweep.arms.items():
    resolved = sweeps.resolve(name, arm, sweep, [("data.source", "files:books")])
    assert bool(resolved.model.num_experts) == (name != "dense")
    assert not resolved.model.capacity_factor  # dropless
    build(resolved, 384)
