"""Sweeps end to end on tiny arms: the table, the cache, interruptions, runs that diverge."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pytest

from sparse_experts import cli
from sparse_experts.config.schema import INCIDENTAL, MAY_CHANGE_ON_RESUME
from sparse_experts.errors import UserError
from sparse_experts.results import read_result
from sparse_experts.sweeps import cache, jobs, train
from sparse_experts.sweeps.cache import Cache
from sparse_experts.sweeps.sweep import RATE, Arm, Sweep
from sparse_experts.sweeps.train import Clock
from sparse_experts.training import loop
from tests.sweeps.sweeps import write_config, write_sweep
from tests.training.tiny import tiny_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sweep")
  write_config(folder)
  return folder


@pytest.fixture
def calls(monkeypatch):
  """Workdirs that were given to `train`, which works as ever."""
  found, train = [], loop.train

  def counted(config, workdir, **kwargs):
    found.append(workdir)
    return train(config, workdir, **kwargs)

  monkeypatch.setattr(loop, "train", counted)
  return found


def run(capsys, path, runs, *argv):
  """(exit code, stdout, stderr)."""
  code = cli.main(["sweep", f"--sweep={path}", f"--runs={runs}", *argv])
  return (code, *capsys.readouterr())


def rows(folder):
  """{arm: cells} of a sweep's table."""
  lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
  header, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
  return {row[0]: dict(zip(header, row, strict=True)) for row in cells}


@pytest.mark.slow
def test_a_sweep_is_interrupted_goes_on_and_is_a_cache(root, calls, capsys, monkeypatch):
  """Stopped inside its second run: the first is not trained again, the second goes on where it was."""
  from sparse_experts.training.session import Session

  runs = root / "runs[x=1] *?\\%20"  # any folder will do
  path = write_sweep(root, "a", seeds="range(2)", more=", baseline='dense'")
  code, out, _ = run(capsys, path, runs, "--dry-run")
  assert code == 0 and calls == []
  assert out.splitlines()[-1] == "4 runs to train, no run was timed yet"
  assert [line.split(":")[0] for line in out.splitlines()[:4]] == [
      "switch seed 0", "dense seed 0", "switch seed 1", "dense seed 1"]

  after = Session.after

  def stop(self, state, pairs):
    after(self, state, pairs)
    if len(calls) == 2 and self.log.done == 3:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Session, "after", stop)
    assert run(capsys, path, runs)[0] == 130
  first, second = calls
  assert read_result(first).finished and not read_result(second).finished

  code, out, err = run(capsys, path, runs)
  assert code == 0, err
  assert calls[2] == second and len(calls) == 5 and len(set(calls)) == 4
  assert f"resuming {second} at step 2" in err
  assert f"switch seed 0: in the cache, {first}" in out and "begun, at step 3 of 4" in out
  assert re.search(r"3 runs to train, about (\d+:)?\d+:\d\d$", out, re.M)
  found = rows(runs / "sweeps" / "a")
  assert list(found) == ["switch", "dense"]
  assert found["dense"]["minus dense"] == ""
  values = {arm: [read_result(job).primary for job in folders] for arm, folders in (
      ("switch", [first, calls[3]]), ("dense", [second, calls[4]]))}
  mean = {arm: sum(v) / 2 for arm, v in values.items()}
  assert found["switch"]["nats per byte"] == f"{mean['switch']:.4f}"
  assert found["switch"]["minus dense"] == f"{mean['switch'] - mean['dense']:+.4f}"
  assert "Seeds 0, 1; learning rate 0.01; pairs 2." in (runs / "sweeps/a/table.md").read_text()
  assert [found["dense"][name] for name in ("dropped", "dead", "MaxVio")] == ["-"] * 3
  last = [[r for r in read_result(folder).rows if "loss" in r][-1] for folder in (first, calls[3])]
  assert float(found["switch"]["MaxVio"]) == pytest.approx(
      sum(row["router/decoder/01/load_max_mean"] - 1 for row in last) / 2, abs=0.006)
  assert float(found["dense"]["ms/step"]) > 0
  kept = json.loads((runs / "sweeps/a/results.json").read_text())
  assert [*kept["arms"]["switch"]["values"].values()] == values["switch"] and kept["baseline"] == "dense"
  assert (runs / "sweeps/a/picture.png").read_bytes().startswith(b"\x89PNG")

  # The dense arm of another sweep is these runs.
  calls.clear()
  other = write_sweep(root, "b", arms={"dense": (":dense", {}), "fast": (":dense", {RATE: 0.02})})
  code, out, err = run(capsys, other, runs, "--only=dense")
  assert code == 0 and calls == [], err
  assert "fast seed 0: to train" in out and "(not among --only)" in out
  assert "arm 'fast' is not finished and is left out of the table" in out
  assert list(rows(runs / "sweeps" / "b")) == ["dense"]
  a, b = ((runs / "sweeps" / name / "dense" / "runs.json") for name in "ab")
  assert json.loads(a.read_text()) == json.loads(b.read_text())

  # Two arms, of one sweep or of two, are compared by their folders.
  assert cli.main(["compare", str(runs / "sweeps/a/switch"), str(runs / "sweeps/b/dense")]) == 0
  assert f"difference {mean['switch'] - mean['dense']:+.4f}, 95% interval" in capsys.readouterr().out


@pytest.mark.slow
def test_diverged_runs_stay_in_with_a_count(root, calls, capsys):
  runs = root / "runs"
  path = write_sweep(root, "c", arms={"dense": (":dense", {}), "lost": (":dense", {RATE: 1e30})}, seeds=[0])
  code, _, err = run(capsys, path, runs)
  assert code == 0, err
  lost = calls[-1]
  assert "not finite" in read_result(lost).diverged
  found = rows(runs / "sweeps" / "c")
  cells = lambda arm: [
      found[arm][name] for name in ("diverged", "nats per byte", "minus dense", "learning rate")]
  assert cells("lost") == ["1", "none", "none", "1e+30"] and cells("dense")[0] == "0"
  assert "A diverged run has no figure" in (runs / "sweeps/c/table.md").read_text()
  calls.clear()
  assert run(capsys, path, runs)[0] == 0 and calls == []  # its verdict is kept


@pytest.mark.slow
def test_each_arm_gets_the_same_learning_rates_and_its_best(root, calls, capsys):
  """Of 0.01 and 1e30, which diverges. The choice reads no reported document and no reported seed."""
  runs = root / "runs"
  path = write_sweep(root, "d", arms=("dense",), seeds=[0], more=", learning_rates=(0.01, 1e30)")
  code, out, err = run(capsys, path, runs)
  assert code == 0, err
  assert "2 runs to train" in out and "then 1 with the best learning rates" in out
  tuned = [read_result(folder) for folder in calls[:2]]
  assert [(r.seed, r.config.optimizer.learning_rate) for r in tuned] == [(1000, 0.01), (1000, 1e30)]
  assert tuned[1].diverged
  config = tuned[0].config
  held_out, reported = (cache.data_of(config, tuning) for tuning in (True, False))
  texts = lambda documents: {d["text"] for d in documents}
  assert tuned[0].last["data_fingerprint"] == held_out.fingerprint
  assert texts(held_out.train) | texts(held_out.valid) == texts(reported.train)
  assert not texts(held_out.valid) & texts(held_out.train)
  table = (runs / "sweeps/d/table.md").read_text()
  assert "Seeds 0; learning rate 0.01." in table
  assert "Learning rates tried by each arm: 0.01, 1e+30, each with one run of seed 1000" in table
  assert "the best of 'dense', 0.01, is the smallest tried: a smaller one may be better" in table


def test_the_best_rate_of_an_arm():
  """The lowest loss; of equals the lowest rate; None diverged; an arm that has not tried all has none."""

  def job(arm, rate, primary, finished=True):
    config = SimpleNamespace(optimizer=SimpleNamespace(learning_rate=rate))
    result = lambda: SimpleNamespace(primary=primary)
    return SimpleNamespace(arm=arm, config=config, result=result, finished=finished)

  assert jobs.best_rates([
      job("a", 0.1, 2.0), job("a", 0.2, 1.0), job("a", 0.3, 1.0), job("b", 0.1, 2.0),
      job("b", 0.2, None, finished=False), job("c", 0.1, None), job("c", 0.05, None),
      job("d", 0.1, None), job("d", 0.2, 3.0),
  ]) == {"a": 0.2, "c": 0.05, "d": 0.2}


def test_keys_change_with_what_a_result_depends_on(root, monkeypatch, tmp_path):
  source = f"files:{root}/text"
  config = tiny_config(data__source=source, data__valid_share=0.3)
  fresh = lambda: Cache(str(tmp_path))
  key = lambda c=config, seed=0, **kwargs: fresh().job("arm", c, seed, **kwargs).workdir
  base = key()
  assert key() == base and fresh().job("other name", config, 0).workdir == base
  for keys in (dict(mesh__data=2), dict(mesh__expert=8, mesh__dcn__expert=2), dict(train__log_every=3),
               dict(train__eval_every=3)):
    assert key(tiny_config(data__source=source, data__valid_share=0.3, **keys)) == base, keys
  for keys in (dict(train__steps=5), dict(model__router__k=2), dict(model__dispatch="scatter"),
               dict(seed__init=3), dict(train__batch_size=16)):
    assert key(tiny_config(data__source=source, data__valid_share=0.3, **keys)) != base, keys
  assert len({base, key(seed=1), key(rate=0.5), key(tuning=True)}) == 4
  assert fresh().job("arm", config, 0, rate=0.5).config.optimizer.learning_rate == 0.5
  assert config.train.seed == 0 and config.optimizer.learning_rate == 1e-2  # as they were
  # Data: the same text elsewhere is the same; a changed document is not.
  shutil.copytree(root / "text", tmp_path / "copy")
  moved = copy.deepcopy(config)
  moved.data.source = f"files:{tmp_path}/copy"
  assert key(moved) == base
  (tmp_path / "copy" / "0.txt").write_text("something else")
  assert key(moved) != base
  # Code: of the package, and of a router from elsewhere.
  monkeypatch.setattr(cache, "package_version", lambda: "another")
  assert key() != base
  monkeypatch.undo()
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "my_routers.py").write_text("class Mine: pass\n")
  own = tiny_config(data__source=source, data__valid_share=0.3, model__router__name="my_routers:Mine")
  before = key(own)
  (tmp_path / "my_routers.py").write_text("class Mine: x = 1\n")
  assert key(own) != before


def test_what_a_key_leaves_out_may_change_on_resuming():
  assert INCIDENTAL < MAY_CHANGE_ON_RESUME


def test_the_clock(tmp_path):
  jobs = [Cache.job.__get__(type("C", (), {"folder": str(tmp_path), "_fingerprint": lambda *_: "f"})())(
      arm, tiny_config(train__steps=steps), 0) for arm, steps in (("a", 1), ("b", 2), ("c", 3))]
  clock = Clock()
  assert clock.time_left(jobs) == "3 runs to train, no run was timed yet"
  for job, seconds in zip(jobs[:2], (10.0, 30.0)):
    (tmp_path / job.workdir).mkdir()
    train._note(job, seconds)
    clock.add(job)
  assert clock.time_left(jobs) == "3 runs to train, about 1:00"  # 10 + 30 + their mean for the third
  assert clock.time_left(jobs[:1]) == "1 run to train, about 0:10"


ARMS = {"a": Arm("a.py"), "b": Arm("b.py")}


@pytest.mark.parametrize("kwargs, message", [
    (dict(arms={}), "a sweep needs arms; write Sweep.arms="),
    (dict(arms={"a": "a.py"}), "arm 'a' is of type str; write Arm"),
    (dict(arms={"a/b": Arm("a.py")}), "arm 'a/b' becomes a folder's name; use letters"),
    (dict(arms=ARMS, baseline="aa"), "baseline='aa' is no arm; "),
    (dict(arms=ARMS, seeds=()), "seeds=.*: give different whole numbers"),
    (dict(arms=ARMS, seeds=(1, 1)), "seeds=.*: give different whole numbers"),
    (dict(arms=ARMS, seeds_together=0), "seeds_together=0 is out of range; choose 1 or more"),
    (dict(arms=ARMS, learning_rates=(0.1, -1)), "learning_rates=.*: give different numbers above 0"),
    (dict(arms=ARMS, learning_rates=(0.1,), seeds=(1000,)), "tuning_seed=1000 is one of the seeds .*; ch"),
])
def test_sweeps_that_are_none(kwargs, message):
  with pytest.raises(UserError, match=message) as caught:
    Sweep(**kwargs)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arms, message", [
    ({"a": ("", {}), "b": ("", {"mesh.data": 2})}, "arms 'a' and 'b' are the same runs: .* or leave it out"),
    ({"a": ("", {}), "b": ("", {"data.valid_share": 0.5})}, "arms 'a' and 'b' have different data, .*"),
    ({"a": ("", {}), "b": ("", {"data.length": 64})},
     "arms 'a' and 'b' are evaluated differently, .*length=32.*"),
])
def test_arms_that_do_not_compare(arms, message, root, capsys):
  code, _, err = run(capsys, write_sweep(root, "e", arms=arms), root / "runs")
  assert code == 2
  assert re.fullmatch(f"error: {message}\n", err), err
