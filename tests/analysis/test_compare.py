"""Means, spreads and paired intervals against values worked out by hand, and what is refused."""

import json

import pytest

from sparse_experts import cli
from sparse_experts.analysis.compare import difference, read_group, spread
from sparse_experts.config import default_config, to_json
from sparse_experts.results import keep_verdict, read_result

LAST = {"eval/final/unigram_entropy": 3.0, "data_fingerprint": "d1", "measure": "m1"}


def write_run(folder, seed, value, keys=(), **last):
  """A finished run of 10 steps; `last` changes its last row, None leaves a key of it out."""
  config = default_config().unlock()
  config.train.seed, config.train.steps = seed, 10
  for key, v in dict(keys).items():
    section, name = key.split(".")
    config[section][name] = v
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(to_json(config))
  rows = [{"step": n, "loss": 4.0 - n / 10, "seconds_per_step": 0.5 * n} for n in (1, 2, 10)]
  row = {"step": 10, "eval/final/nats_per_byte": value} | LAST | last
  rows.append({k: v for k, v in row.items() if v is not None})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1')
  return folder


def write_group(folder, values, **kwargs):
  for seed, value in values.items():
    write_run(folder / f"seed{seed}", seed, value, **kwargs)
  return str(folder)


def test_a_spread_by_hand():
  """1, 2, 6: mean 3, squares of 2, 1 and 3 sum to 14, over 2 is 7. t(0.975, 2) = 4.302653 (any table)."""
  found = spread([1.0, 2.0, 6.0])
  assert (found.n, found.mean) == (3, 3.0)
  assert found.deviation == pytest.approx(7**0.5)
  assert found.half == pytest.approx(4.302653 * (7 / 3) ** 0.5, rel=1e-6)
  assert found.interval == pytest.approx((-3.5724, 9.5724), abs=1e-4)
  one = spread([2.0])
  assert (one.n, one.mean, one.deviation, one.interval) == (1, 2.0, None, None)
  assert (spread([]).n, spread([]).mean) == (0, None)


def test_a_paired_difference_by_hand(tmp_path):
  """Differences -0.1, -0.2, -0.3 of runs that differ by 1 among themselves: pairing takes that away."""
  a = read_group(write_group(tmp_path / "a", {0: 1.9, 1: 2.8, 2: 3.7}))
  b = read_group(write_group(tmp_path / "b", {2: 4.0, 0: 2.0, 1: 3.0}))
  found = difference(a, b)
  assert (found.n, found.mean, found.deviation) == (3, pytest.approx(-0.2), pytest.approx(0.1))
  assert found.half == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)  # 0.2484
  assert spread(b.values.values()).deviation == pytest.approx(1.0)


def test_what_a_run_tells(tmp_path):
  run = read_result(str(write_run(tmp_path / "run", 3, 2.5)))
  assert (run.seed, run.primary, run.finished, run.diverged) == (3, 2.5, True, "")
  assert run.step_seconds == 1.0  # median of 0.5, 1 and 5
  unfinished = read_result(str(write_run(tmp_path / "longer", 3, 2.5, keys={"train.steps": 20})))
  assert (unfinished.finished, unfinished.primary) == (False, None)
  lost = read_result(str(write_run(tmp_path / "nan", 3, float("nan"))))
  assert lost.finished and lost.diverged == "the final loss is nan" and lost.primary is None
  keep_verdict(unfinished.workdir, "step 12: the loss is not finite")
  assert read_result(unfinished.workdir).diverged == "step 12: the loss is not finite"


def compare(capsys, *argv):
  code = cli.main(["compare", *map(str, argv)])
  printed = capsys.readouterr()
  return code, printed.out, printed.err


def test_compare_command(tmp_path, capsys):
  a = write_group(tmp_path / "a", {0: 1.9, 1: 2.8, 2: float("nan"), 5: 1.0})
  b = write_group(tmp_path / "b", {0: 2.0, 1: 3.0, 2: 4.0}, keys={"model.num_experts": 0, "mesh.data": 2})
  code, out, err = compare(capsys, a, "--json", b, f"--out={tmp_path}/x.png")  # flags may stand anywhere
  assert code == 0, err
  lines = out.splitlines()
  assert lines[0] == f"{a}: 1.9000 nats per byte, standard deviation 0.9000 over 3 seeds; 1 more diverged"
  assert lines[1] == f"{b}: 3.0000 nats per byte, standard deviation 1.0000 over 3 seeds"
  # mean -0.15, deviation 0.0707, t(0.975, 1) = 12.7062
  assert lines[2] == "difference -0.1500, 95% interval -0.7853 to +0.4853, over 2 pairs of equal seed"
  assert lines[3] == "left out of the difference, as only one of the two has a figure: seed 2, 5"
  assert lines[4] == "their configs differ in model.num_experts (8 and 0)"
  found = json.loads(lines[-1])
  assert found["difference"]["interval"] == pytest.approx([-0.7853, 0.4853], abs=1e-4)
  assert found["a"]["values"] == {"0": 1.9, "1": 2.8, "5": 1.0} and found["a"]["diverged"] == 1
  assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_interval(tmp_path, capsys):
  a, b = (write_run(tmp_path / name, 0, value) for name, value in (("a", 1.5), ("b", 2.0)))
  _, out, _ = compare(capsys, a, b)
  assert "difference -0.5000, without an interval, which needs two pairs; train more" in out
  lost = write_run(tmp_path / "lost", 0, float("nan"))
  _, out, _ = compare(capsys, lost, b)
  assert "none nats per byte over 0 seeds; 1 more diverged" in out and "difference unknown: no seed on" in out
