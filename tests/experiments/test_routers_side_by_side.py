"""The stream's entropy and its best routing, what a gap is, and the command on two arms."""

import json
import math

import jax
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
from sparse_experts.data.testbeds import Clusters
from sparse_experts.models import build


@pytest.fixture(scope="module")
def drawn():
  """(stream, world, 1024 groups)."""
  stream = Clusters()
  world = stream.world(jax.random.key(0))
  return stream, world, stream.batches(world, jax.random.key(1), (1024,))


def test_every_router_and_layer_has_an_arm():
  known = {*config.ROUTERS, *config.LAYERS}
  assert {name for name, _ in ARMS.values()} == known | {DENSE}
  assert arms([*config.ROUTERS, "new"]).keys() - arms(config.ROUTERS).keys() == {"new"}
  assert len(ARMS) == len(known) + 2  # dense, and top_k twice
  assert ORACLE in ARMS and RANDOM in ARMS and SWITCH in ARMS and TUNING_SEED not in SEEDS


def test_the_floor_is_the_entropy_that_is_drawn(drawn):
  """-log p(target) given cluster and symbol, p as the stream promises it, averaged over draws."""
  stream, world, batch = drawn
  likely = np.asarray(world.map_NV)[batch.tokens.task, batch.tokens.id] == np.asarray(batch.target_GT)
  rest = stream.eps / stream.targets
  nats = np.where(likely, -math.log(1 - stream.eps + rest), -math.log(rest))
  # 65,536 draws: 6 standard errors.
  assert abs(nats.mean() - stream.floor) < 6 * nats.std() / math.sqrt(nats.size)
  # And p is what is drawn: how often another target comes, and that it is any of them.
  assert likely.mean() == pytest.approx(1 - stream.eps + rest, abs=6 * math.sqrt(0.1 / nats.size))
  others = np.bincount(np.asarray(batch.target_GT)[~likely], minlength=stream.targets)
  assert others.min() > 0.7 * others.mean()


def test_the_best_routing_is_even_linear_and_within_a_sequence(drawn):
  stream, world, batch = drawn
  cluster_GT = np.asarray(batch.tokens.task)
  counts = np.apply_along_axis(np.bincount, 1, cluster_GT)
  np.testing.assert_array_equal(counts, np.full((1024, stream.clusters), stream.length))
  sequence_GT = np.asarray(batch.tokens.sequence)
  assert len(np.unique(sequence_GT)) == 1024 * stream.clusters
  assert len(np.unique(sequence_GT * 100 + cluster_GT)) == 1024 * stream.clusters  # one cluster each
  # Least squares on one half tells the cluster on the other half.
  x_ND = np.asarray(world.vectors(batch)).reshape(-1, stream.embed_dim)
  x_ND = np.concatenate([x_ND, np.ones((len(x_ND), 1))], axis=1)
  y_N = cluster_GT.reshape(-1)
  half = len(y_N) // 2
  w, *_ = np.linalg.lstsq(x_ND[:half], np.eye(stream.clusters)[y_N[:half]], rcond=None)
  assert ((x_ND[half:] @ w).argmax(-1) == y_N[half:]).mean() > 0.99


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
