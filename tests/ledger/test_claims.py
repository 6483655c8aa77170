"""Claim files: what is refused, what is appended, and a claim run from its file to its verdict."""

import copy
import errno
import hashlib
import json
import os
import pathlib
import subprocess

import pytest

from sparse_experts import cli, small_files
from sparse_experts.errors import UserError
from sparse_experts.ledger import claim_file, measures, run, table
from sparse_experts.ledger.verdict import Figure
from sparse_experts.storage import local

ROOT = pathlib.Path(__file__).parent.parent.parent
PAIRED = {
  "paper": "A et al. 2020", "statement": "b beats a", "published": "0.1 nats", "source": "table 1",
  "estimand": "difference in validation loss", "metric": "nats per byte", "rule": "paired",
  "decision": "t-interval", "prediction": "shown", "sign": -1, "delta": 0.01, "baseline": "a", "tested": "b",
  "arms": {"a": {"config": "configs/smoke.py"},
           "b": {"config": "configs/smoke.py", "overrides": {"model.num_layers": 2}}},
  "scales": {"cpu": {"minutes": 1, "tokens": 1000, "seeds": [0, 1, 2, 3, 4], "power": 0.8,
                     "pilot": {"seeds": [100, 101], "deviation": 0.005}}},
}
PUBLISHED = {**{key: PAIRED[key] for key in (*claim_file.FIELDS,)}, "rule": "published", "at_least": 1,
             "measure": "tests.ledger.test_claims:two_figures",
             "scales": {"cpu": {"minutes": 1, "tokens": 0}}}
LOSSES = {"a": {str(s): 2.0 for s in range(5)}, "b": {str(s): 1.9 + s / 1000 for s in range(5)}}


def two_figures(path, quick):
  return [Figure("one", 1.0, 1.1, 0.9, 1.2), Figure("two", 1.0, 2.0, 1.5, 2.5)]


def counted(arm, seed, quick):
  """The arm's offset and a little more; `calls` has what was asked, and it is stopped after `most`."""
  if len(calls) == most[0]:
    raise KeyboardInterrupt
  calls.append((arm["offset"], seed))
  return arm["offset"] + 0.001 / (seed + 1)


calls, most = [], [1000]
COMPUTED = {**PAIRED, "arms": {"a": {"offset": 2.0}, "b": {"offset": 1.9}},
            "measure": "tests.ledger.test_claims:counted"}


def write(folder, name, fixed, results=()):
  path = folder / f"{name}.json"
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps({"fixed": fixed, "results": list(results)}))
  return path


def read(folder, name="paper/claim"):
  return claim_file.ledger(str(folder))[name]


def changed(fixed, key, value):
  fixed = copy.deepcopy(fixed)
  at = fixed
  *sections, last = key.split("/")
  for section in sections:
    at = at[section]
  if value is None:
    del at[last]
  else:
    at[last] = value
  return fixed


def test_every_claim_of_the_repository_is_whole():
  assert len(claim_file.ledger(str(ROOT / "experiments"))) >= 3


@pytest.mark.parametrize("key, value, message", [
    ("delta", None, "'delta' is missing; a claim fixes it before it runs"),
    ("delta", 0, "delta=0; the smallest effect of interest is above 0"),
    ("delta", "0.1", "delta='0.1' is no int"), ("sign", True, "sign=True is no int"),
    ("sign", 2, "sign=2; it is -1, 0"),
    ("rule", "bayes", "rule='bayes' is unknown; known: paired, published"),
    ("tested", "c", "tested='c' is no arm"),
    ("statment", "x", "'statment' is unknown; did you mean 'statement'?"),
    ("arms/a", {"k": 1}, "an arm has no config; give each one, or a measure"),
    ("scales/abacus", {}, "scale 'abacus' is unknown; known: cpu, gpu, tpu"),
    ("scales/cpu/seeds", [0, 1, 2, 3], "4 seeds on cpu; at least 5"),
    ("scales/cpu/seeds", [0, 1, 2, 3, 3], "4 seeds on cpu; at least 5"),
    ("scales/cpu/seeds", [0, 1, 2, 3, 100], "the pilot's seeds are counted too"),
    ("delta", 0.001, "power=0.8 on cpu, but 5 seeds whose differences deviate by 0.005 have 0.06 at "
     "delta=0.001; fix 199 seeds")])
def test_a_file_that_fixes_too_little(tmp_path, key, value, message):
  write(tmp_path, "paper/claim", changed(PAIRED, key, value))
  with pytest.raises(UserError, match=message):
    claim_file.ledger(str(tmp_path))


def test_results_are_appended_and_nothing_before_them_may_change(tmp_path):
  path = write(tmp_path, "paper/claim", PAIRED)
  result = {"scale": "cpu", "figures": LOSSES, "minutes": 1, **run.judged(read(tmp_path), LOSSES, None)}
  once = claim_file.append(read(tmp_path), result)
  claim_file.append(once, result | {"minutes": 2})
  claim = read(tmp_path)
  assert [r["minutes"] for r in claim.results] == [1, 2]
  assert claim.newest("cpu")["minutes"] == 2 and claim.newest("gpu") is None
  for change in (lambda c: c["fixed"].update(delta=0.5), lambda c: c["results"][0].update(verdict="opposite"),
                 lambda c: c["results"][0]["figures"]["a"].update({"0": 3.0}), lambda c: c["results"].pop(0)):
    content = json.loads(path.read_text())
    change(content)
    write(tmp_path, "other/claim", content["fixed"], content["results"])
    with pytest.raises(UserError, match="was changed after its result"):
      claim_file.ledger(str(tmp_path))


@pytest.mark.parametrize("control, wanted", [
    (None, "shown"), ("shown", "shown"), ("opposite", "underpowered")])
def test_a_control_that_failed_decides_nothing(tmp_path, control, wanted):
  write(tmp_path, "paper/claim", PAIRED)
  found = run.judged(read(tmp_path), LOSSES, control)
  assert found["verdict"] == wanted and found["mean"] == pytest.approx(-0.098)


def test_a_diverged_run_is_counted_and_decides_nothing(tmp_path):
  write(tmp_path, "paper/claim", PAIRED)
  found = run.judged(read(tmp_path), {**LOSSES, "a": LOSSES["a"] | {"3": None}}, None)
  assert found["verdict"] == "underpowered" and found["diverged"] == {"a": 1, "b": 0} and found["pairs"] == 4
  assert "1 of 5 pairs have a run that diverged" in found["why"]


def test_the_table_counts_what_was_tested(tmp_path):
  write(tmp_path, "paper/claim", PAIRED)
  write(tmp_path, "paper/other", PAIRED)
  claim = read(tmp_path)
  result = {"scale": "cpu", "figures": LOSSES, "minutes": 3} | run.judged(claim, LOSSES, None)
  claim_file.append(claim, result)
  text = table.markdown(claim_file.ledger(str(tmp_path)))
  assert "-0.098 (-0.09996 to -0.09604) nats per byte | shown" in text
  assert "not run | 5     | 80%   | 1 on cpu" in text
  plan = PAIRED["scales"]["cpu"] | {"seeds": list(range(8)), "minutes": 9000}
  write(tmp_path, "paper/other", changed(PAIRED, "scales", {"tpu": plan}))
  assert "out of reach | 8     | 80%   | 9,000 on tpu" in table.markdown(claim_file.ledger(str(tmp_path)))
  assert "2 claims, 1 tested: 1 shown. Of 1 verdicts" in text
  assert "about 0.1 should be expected to be wrong" in text


def test_published_numbers_from_file_to_verdict(tmp_path, capsys):
  path = write(tmp_path, "paper/claim", PUBLISHED)
  flags = [f"--ledger={tmp_path}", f"--runs={tmp_path}/runs"]
  assert cli.main(["claim", "run", "paper/claim", "--quick", *flags]) == 0
  assert not json.loads(path.read_text())["results"] and "--quick judges nothing" in capsys.readouterr().out
  assert cli.main(["claim", "run", "paper/claim", *flags]) == 0
  result = json.loads(path.read_text())["results"][0]
  assert (result["verdict"], result["inside"], result["of"]) == ("shown", 1, 2)
  assert {"code", "versions", "device", "minutes", "before"} <= result.keys()
  assert "1 of 2 published numbers inside our intervals: shown" in capsys.readouterr().out


def test_computed_figures_are_kept_one_by_one(tmp_path, capsys):
  path = write(tmp_path, "paper/claim", COMPUTED)
  ask = ["claim", "run", "paper/claim", f"--ledger={tmp_path}", f"--runs={tmp_path}/runs"]
  calls.clear()
  most[0] = 3
  assert cli.main(ask) == 130
  most[0] = 1000
  assert cli.main(ask) == 0
  assert sorted(calls) == sorted((offset, seed) for offset in (2.0, 1.9) for seed in range(5))
  result = json.loads(path.read_text())["results"][0]
  assert result["verdict"] == "shown" and result["mean"] == pytest.approx(-0.1)
  assert result["figures"]["b"]["4"] == pytest.approx(1.9002)
  assert "minutes left" in capsys.readouterr().out


def on_data(arm, seed, quick, path):
  return len(pathlib.Path(path).read_bytes()) + arm["offset"] + 0.001 / (seed + 1)


def test_a_measure_on_outside_data_gets_their_path(tmp_path, capsys):
  (tmp_path / "data").mkdir()
  (tmp_path / "data/b.csv").write_bytes(b"12345")
  digest = hashlib.sha256(b"12345").hexdigest()
  data = {"repository": "x/y", "commit": "1", "file": "a/b.csv", "sha256": digest}
  write(tmp_path, "paper/claim", {**COMPUTED, "measure": "tests.ledger.test_claims:on_data", "data": data})
  ask = ["claim", "run", "paper/claim", f"--ledger={tmp_path}", f"--runs={tmp_path}/runs"]
  assert cli.main(ask) == 2 and "needs a/b.csv of x/y at commit 1" in capsys.readouterr().err
  assert cli.main([*ask, f"--data={tmp_path}/data"]) == 0
  result = read(tmp_path).newest("cpu")
  assert result["data"] == digest and result["figures"]["a"]["0"] == pytest.approx(7.001)


def test_the_code_of_a_result_is_all_that_its_measure_imports(tmp_path, monkeypatch):
  """A change of a file that the measuring file imports makes another code, so kept figures are not taken."""
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / "study").mkdir()
  for name, text in {
      "__init__": "", "measure": "from study import stream\nfrom study.arms import DENSE\n",
      "stream": "import json\nWIDTH = 1\n", "arms": "DENSE = 1\n", "apart": ""}.items():
    (tmp_path / f"study/{name}.py").write_text(text)
  write(tmp_path, "paper/claim", {**COMPUTED, "measure": "study.measure:f"})
  codes = [measures.code(read(tmp_path))]
  for name in ("stream", "arms", "measure", "apart"):
    with (tmp_path / f"study/{name}.py").open("a") as file:
      file.write("# changed\n")
    codes.append(measures.code(read(tmp_path)))
  assert len({*codes}) == 4 and codes[-1] == codes[-2]  # nothing imports `apart`


def test_kept_figures_outlive_an_error_of_the_machine(tmp_path, monkeypatch, capsys):
  """They are not measured again, over what is kept: the same call goes on once the machine is mended."""
  write(tmp_path, "paper/claim", COMPUTED)
  ask = ["claim", "run", "paper/claim", f"--ledger={tmp_path}", f"--runs={tmp_path}/runs"]
  calls.clear()
  most[0] = 3
  assert cli.main(ask) == 130
  before = calls.copy()
  with monkeypatch.context() as patch:
    patch.setattr(small_files, "WAITS", ())
    patch.setattr(local, "open", too_many_files, raising=False)
    assert cli.main(ask) == 2 and calls == before
  assert "cannot be read (Too many open files)" in capsys.readouterr().err
  most[0] = 1000
  assert cli.main(ask) == 0 and len(calls) == len({*calls}) == 10


def too_many_files(*_):
  raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_pilot_tells_the_seeds_that_a_claim_needs(tmp_path, capsys):
  """Its own seeds, whatever delta is by then; and a claim whose pilot was not run is not run either."""
  fixed = changed(COMPUTED, "scales/cpu/pilot", {"seeds": [100, 101, 102]})
  path = write(tmp_path, "paper/claim", fixed)
  flags = [f"--ledger={tmp_path}", f"--runs={tmp_path}/runs"]
  calls.clear()
  assert cli.main(["claim", "run", "paper/claim", *flags]) == 2
  assert "the pilot has no deviation; first: claim pilot paper/claim" in capsys.readouterr().err
  assert cli.main(["claim", "pilot", "paper/claim", *flags]) == 0
  assert sorted(calls) == sorted((offset, seed) for offset in (2.0, 1.9) for seed in (100, 101, 102))
  out = capsys.readouterr().out
  assert "of 3 pairs; delta 0.01 takes 2 seeds for a power of 80%, and 5 seeds have 100%" in out
  write(tmp_path, "paper/claim", changed(fixed, "delta", 0.02))
  assert cli.main(["claim", "pilot", "paper/claim", *flags]) == 0 and len(calls) == 6  # kept, not run again
  assert not json.loads(path.read_text())["results"]


def test_a_pattern_runs_what_waits_controls_first(tmp_path, capsys):
  write(tmp_path, "paper/a", {**COMPUTED, "control": "paper/b"})
  write(tmp_path, "paper/b", {**COMPUTED, "is_control": True})
  write(tmp_path, "other/c", COMPUTED)
  write(tmp_path, "paper/p", PUBLISHED)
  calls.clear()
  assert cli.main(["claim", "pilot", "paper/*", f"--ledger={tmp_path}", f"--runs={tmp_path}/runs"]) == 0
  assert "2 of 2: paper/a" in capsys.readouterr().out  # published numbers need none
  (tmp_path / "paper/p.json").unlink()
  ask = ["claim", "run", "paper/*", f"--ledger={tmp_path}", f"--runs={tmp_path}/runs"]
  calls.clear()
  assert cli.main(ask) == 0
  out = capsys.readouterr().out
  assert out.index("1 of 2: paper/b, 1 minutes planned") < out.index("2 of 2: paper/a") and len(calls) == 20
  claims = claim_file.ledger(str(tmp_path))
  assert claims["paper/a"].newest("cpu")["verdict"] == "shown" and not claims["other/c"].results
  assert cli.main(ask) == 2 and len(calls) == 20
  assert "of 2 claims that match 'paper/*' none waits for a result at --scale=cpu" in capsys.readouterr().err


def test_a_claim_is_committed_before_its_result(tmp_path, capsys):
  path = write(tmp_path, "paper/claim", PUBLISHED)
  who = ["-c", "user.name=a", "-c", "user.email=b"]
  git = lambda *what: subprocess.run(["git", "-C", tmp_path, *who, *what], check=True, capture_output=True)
  git("init")
  ask = ["claim", "run", "paper/claim", f"--ledger={tmp_path}"]
  assert cli.main(ask) == 2 and "is not committed as it stands; commit it first" in capsys.readouterr().err
  git("add", ".")
  git("commit", "-m", "claim")
  assert cli.main(ask) == 0
  write(tmp_path, "paper/claim", {**PUBLISHED, "at_least": 2})
  assert cli.main(ask) == 2 and str(path) in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["claim", "try"], "claim try is unknown; write claim list"),
    (["claim", "run", "nobody/*"], "no claim matches 'nobody/*'; claim list shows all"),
    (["claim", "pilot", "paper/claim"], "is judged by published numbers, which need no pilot; run it"),
    (["claim", "pilot", "paper/unseeded"], "a pilot wants two seeds or more that no result counts"),
    (["claim", "run"], "claim run takes one name, got 0"),
    (["claim", "show", "paper/clam"], "there is no claim 'paper/clam'; did you mean 'paper/claim'?"),
    (["claim", "run", "paper/claim", "--scale=tpu"],
     "claim paper/claim fixes nothing for --scale=tpu; it has cpu, gpu"),
    (["claim", "run", "paper/claim", "--scale=gpu"], "--scale=gpu needs a GPU, and jax found cpu"),
    (["claim", "run", "paper/claim", "--data=."], "claim paper/claim uses no outside data"),
    (["claim", "run", "paper/outside"], "needs a/b.gz of x/y at commit 1 (sha256 0000...); download it"),
    (["claim", "run", "paper/controlled"],
     "its positive control has no result at this scale; first: claim run paper/claim"),
    (["claim", "run", "paper/nowhere"], "measure='tests.nothing:f' cannot be imported"),
    (["claim", "list", "--ledger=nowhere"], "--ledger=nowhere: no such folder")])
def test_one_line_for_a_mistake(tmp_path, capsys, argv, message):
  both = {"cpu": PUBLISHED["scales"]["cpu"], "gpu": PUBLISHED["scales"]["cpu"]}
  write(tmp_path, "paper/claim", {**PUBLISHED, "scales": both})
  write(tmp_path, "paper/outside", {**PUBLISHED, "data": {
      "repository": "x/y", "commit": "1", "file": "a/b.gz", "sha256": "0000"}})
  write(tmp_path, "paper/controlled", {**PAIRED, "control": "paper/claim"})
  write(tmp_path, "paper/unseeded", changed(COMPUTED, "scales/cpu/pilot", {}))
  write(tmp_path, "paper/nowhere", {**PUBLISHED, "measure": "tests.nothing:f"})
  where = [] if any(flag.startswith("--ledger") for flag in argv) else [f"--ledger={tmp_path}"]
  assert cli.main([*argv, *where]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
