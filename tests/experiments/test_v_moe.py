"""V-MoE's claims: what is measured, kept and compared; the runs themselves are the package's."""

import json
import math
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.v_moe import __main__ as command
from experiments.v_moe import cifar, paired, parts
from sparse_experts import load
from sparse_experts.config import load_config
from sparse_experts.models import describe
from sparse_experts.training.loop import train
from tests.shrink import shrink


def test_information_by_hand():
  """Three images of 4 tokens: classes told wholly, not at all, and by one image of three."""
  label = np.array([0, 1, 1])
  assert parts.information(np.array([[4, 0], [0, 2], [0, 2]]), label) == pytest.approx(math.log(2))
  assert parts.information(np.array([[2, 2], [1, 1], [3, 3]]), label) == pytest.approx(0)
  joint = np.array([[4, 4], [0, 4]]) / 12  # expert by class
  expected = sum(joint[e, c] * math.log(joint[e, c] / joint[e].sum() / joint[:, c].sum())
                 for e in range(2) for c in range(2) if joint[e, c])
  assert parts.information(np.array([[4, 0], [4, 0], [0, 4]]), label) == pytest.approx(expected)


def test_what_is_done_is_kept(tmp_path, capsys):
  made = []
  figures = lambda: made.append(1) or {"accuracy": 0.5}
  for _ in range(2):
    found = command.Kept(str(tmp_path), {"quick": True}).get("capacity/choice/0.1", figures)
    assert found["accuracy"] == 0.5
  assert len(made) == 1
  assert capsys.readouterr().out.count("capacity/choice/0.1: accuracy 0.5") == 2
  assert command.main(["capacity", f"--out={tmp_path}"]) == 2
  assert "holds results of --quick=True, not False; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["capcity"], "error: part 'capcity' is unknown; did you mean 'capacity'?"),
    (["all", "--run=runs/a"], "error: --run=runs/a is one model, upcycling trains many; name another part"),
    (["--steps=3"], "error: unrecognized arguments: --steps=3")])
def test_mistakes(argv, message, capsys):
  assert command.main(argv) == 2
  assert message in capsys.readouterr().err


def test_the_cost_that_is_told_first():
  of = lambda *parts, given=None: command.num_runs(parts, given, seeds=5)
  assert [of("classes"), of("capacity", "few_shot"), of("upcycling"), of(*command.PARTS)] == [1, 1, 20, 22]
  assert of("capacity", "classes", given="runs/a") == 0


def test_the_three_arms_do_equal_work():
  load = lambda arg: load_config(f"experiments/v_moe/config_cifar.py{arg}")
  flops = [describe(load(arg), 10)["flops_per_token"] for arg in ("", ":dense", ":soft_moe")]
  assert max(flops) / min(flops) < 1.01


@pytest.mark.slow
def test_a_look_at_each_image_sums_up_to_the_evaluation(tmp_path):
  """And what is kept of a run for elsewhere is that run."""
  run = train(shrink(load_config(cifar.CONFIG)), str(tmp_path / "run"))
  found, final = cifar.look(run, "dropless"), cifar.read_rows(str(tmp_path / "run" / "metrics.jsonl"))[-1]
  assert len(found["nats"]) == final["eval/final/images"]
  assert found["nats"].mean() == pytest.approx(final["eval/final/nats_per_image"], rel=1e-5)
  assert (found["guess"] == found["label"]).mean() == pytest.approx(final["eval/final/accuracy"])
  cifar.keep_weights(run, str(tmp_path))
  with tarfile.open(tmp_path / "weights.tar") as tar:
    tar.extractall(tmp_path / "there", filter="data")
  there = cifar.look(load(str(tmp_path / "there" / "weights")), "dropless")
  np.testing.assert_array_equal(there["nats"], found["nats"])


def test_what_runs_leave_is_gathered(tmp_path):
  """Of a run that ended, of one that was cut off while it wrote, and of one that never began."""
  args = SimpleNamespace(workdir=str(tmp_path / "work"), out=str(tmp_path / "out"), steps=9)
  for arm, rest in (("dense", ""), ("v_moe", '{"step": 8, "lo')):
    where = tmp_path / "work" / f"{arm}_0"
    where.mkdir(parents=True)
    rows = [{"step": 4, "loss": 2.0, "seconds_per_step": 0.5},
            {"step": 5, "eval/accuracy": 0.3, "eval/nats_per_image": 1.9}]
    (where / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
  np.savez(tmp_path / "work" / "dense_0" / "images.npz", **{"nats/dropless": np.ones(3)})
  (tmp_path / "work" / "v_moe_0" / "weights.tar").write_bytes(b"x" * (cifar.PART + 1))
  runs = cifar.gather(args, [(arm, 0) for arm in cifar.ARMS], {("dense", 0): 0, ("v_moe", 0): -15})
  assert [runs[f"{arm}/0"]["step"] for arm in cifar.ARMS] == [5, 5, 0]
  assert runs["v_moe/0"]["valid"] == [[5, 0.3, 1.9]] and runs["v_moe/0"]["seconds_per_step"] == 0.5
  assert json.loads((tmp_path / "out" / "runs.json").read_text())["runs"]["dense/0"]["code"] == 0
  assert list(np.load(tmp_path / "out" / "images.npz")) == ["dense/0/nats/dropless"]
  assert [(tmp_path / "out" / f"weights.tar.{i}").stat().st_size for i in range(2)] == [cifar.PART, 1]
  assert cifar.progress(runs).startswith("dense step 5-5, 500 ms, 1 ended, 1 well; v_moe step 5-5, 500 ms, 1")


def test_pairs_of_runs_by_hand():
  """Four images, two seeds: intervals over seeds and images from their textbook formulas."""
  diff = np.array([[1.0, 0, 0, 1], [1, 0, -1, 0]])
  found = paired.difference(diff)
  assert found["mean"] == pytest.approx(0.25)
  assert found["seeds"] == pytest.approx((0.25 - 12.706 * 0.25, 0.25 + 12.706 * 0.25), rel=1e-4)
  half = 1.96 * np.std([1, 0, -0.5, 0.5], ddof=1) / 2
  assert found["images"] == pytest.approx((0.25 - half, 0.25 + half))
  assert -0.5 <= found["both"][0] < 0.25 < found["both"][1] <= 1
  assert paired.mcnemar(np.array([1] * 8 + [-1] * 2 + [0] * 5)) == {
      "more": 8, "fewer": 2, "p": pytest.approx(2 * (1 + 10 + 45) / 1024)}
  assert paired.mcnemar(np.zeros(3))["p"] == 1


def test_runs_that_were_cut_off_are_compared_at_a_step_that_all_reached():
  """Two seeds: differences of 10 and 20 points at step 8, which the dense run of seed 1 did not go beyond."""
  gain = {"dense": 0, "v_moe": 0.1, "soft_moe": 0}
  runs = {f"{arm}/{seed}": {"valid": [[4, 0.0, 9.0], [8, 0.5 + gain[arm] * (1 + seed), 2.0], [12, 0.0, 9.0]]}
          for arm in paired.ARMS for seed in (0, 1)}
  runs["dense/1"]["valid"].pop()
  found = paired.at_the_same_step(runs)
  assert found["step"] == 8
  assert found["v_moe - dense"]["right"]["mean"] == pytest.approx(0.15)
  assert found["v_moe - dense"]["right"]["seeds"][0] == pytest.approx(0.15 - 12.706 * 0.05, rel=1e-4)
  assert found["soft_moe - dense"]["nats"]["mean"] == 0
