"""The verbs one after another on tiny runs."""

import json
import logging
import re
import sys

import numpy as np
import pandas
import pytest

from sparse_experts import __main__, cli
from sparse_experts.config import replaced
from tests import full_disk
from tests.report.written_run import write_run
from tests.tasks.test_images import digits_config


def run(capsys, *argv):
  """(exit code, stdout, stderr) of a command."""
  code = cli.main(list(argv))
  return (code, *capsys.readouterr())


@pytest.mark.slow
def test_a_folder_of_ones_own_trains_by_one_flag(runs, capsys, tmp_path):
  """As small as a note."""
  (tmp_path / "text").mkdir()
  (tmp_path / "text" / "note.txt").write_text("Remember the milk, and to mend the tap.\n")
  code, _, err = run(capsys, "train", f"--config={runs}/tiny.py:configs/smoke.py", f"--workdir={tmp_path}/r",
                     f"--config.data.source=files:{tmp_path}/text", "--config.data.valid_share=0.08")
  assert code == 0 and "validation loss" in err, err


def test_a_run_leaves_its_files(runs):
  names = {path.name for path in (runs / "decoder").iterdir()}
  assert {"config.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= names
  rows = [json.loads(line) for line in (runs / "decoder" / "metrics.jsonl").read_text().splitlines()]
  assert rows[-1]["step"] == 2
  assert {"step", "loss", "learning_rate", "tokens_per_second"} <= set().union(*rows)


def test_evaluate(runs, capsys):
  code, out, _ = run(capsys, "evaluate", f"--workdir={runs}/decoder", "--json", "--calibration",
                     "--config.model.dispatch=scatter", "--config.mesh.data=2")
  assert code == 0
  numbers = json.loads(out.splitlines()[-1])
  assert numbers["step"] == 2
  assert {"nats_per_byte", "rerouting_cost", "unigram_entropy", "bigram_entropy"} <= set(numbers)
  assert numbers["calibration/nats"] == pytest.approx(numbers["nats_per_target"], rel=1e-5)
  assert numbers["calibration/targets"] == numbers["targets"] and numbers["calibration/groups"] > 1
  debiased = numbers["calibration/equal_mass/ece2_debiased"]
  low, high = numbers["calibration/intervals"]["equal_mass/ece2_debiased"]
  assert re.search(rf"^  debiased +{debiased:.4f} +{low:.4f} to {high:.4f}$", out, re.MULTILINE)
  assert len(re.findall(r"^0\.\d{4} +[01]\.\d{4} +[\d.]+%$", out, re.MULTILINE)) == len(
      numbers["calibration/bins"])


def test_sample_continues_a_prompt(runs, capsys):
  argv = ("sample", f"--workdir={runs}/decoder", "--prompt=def f1(", "--length=5", "--seed=3")
  code, out, _ = run(capsys, *argv)
  assert code == 0
  assert out.startswith("def f1(")
  assert run(capsys, *argv)[1] == out


def test_trace(runs, capsys):
  """The arrays, what they are of, a picture, and the one line that reads them."""
  out = runs / "trace.npz"
  code, printed, _ = run(capsys, "trace", f"--workdir={runs}/decoder", f"--out={out}", "--steps=all",
                         "--records=3", "--kind=train", "--regret=1")
  assert code == 0
  (line,) = [text for text in printed.splitlines() if text.startswith("table = ")]
  exec(line, names := {"numpy": np})
  frame, about = pandas.DataFrame(names["table"]), json.loads((runs / "trace.json").read_text())
  assert f"{frame.valid.sum()} assignments: " in printed
  assert set(frame.step) == {1, 2} == set(about["steps"])
  frame = frame[frame.step == 2]
  assert set(frame.layer) == set(about["layers"]) and frame.example.nunique() == about["records"] == 3
  assert about["data"] == about["trained_on"] and len(about["domains"]) > frame.domain.max()
  experts = about["layers"]["decoder/01"]["num_experts"]
  row = re.search(r"^2 +decoder/01 +96 +([\d.]+) +[\d.]+ +([\d.]+)%", printed, re.MULTILINE)
  assert float(row[1]) == pytest.approx(frame.expert.value_counts().max() / (96 / experts), abs=0.005)
  assert float(row[2]) == pytest.approx(100 * (~frame.kept).mean(), abs=0.05)
  assert (runs / "trace.png").read_bytes()[:4] == b"\x89PNG" and not (runs / "trace.patches.png").exists()
  lines = re.search(r"^decoder/01, what each expert takes .*\n((?:  expert .*\n)+)", printed, re.MULTILINE)[1]
  tokens = [line.split()[2:] for line in lines.splitlines()]
  assert len(tokens) == experts
  assert set().union(*tokens) <= {"nothing", "␣", "⏎", "<bos>", *"def(x):rtun+0123456789"}
  of = about["specialisation"]["decoder/01"]["token class"]
  above = [of[arm]["above"] for arm in ("trained", "untrained", "hash")]
  assert "decoder/01  token class  " + "  ".join(f"{x:.4f}" for x in above) in re.sub("  +", "  ", printed)
  assert set(about["specialisation"]["decoder/01"]) == {"domain", "position", "token class"}
  assert re.search(r"by the router's largest probability, in quarters:\n.*\n(decoder/01 .*\n)+", printed)
  assert "by the model's probability of the token's target, in quarters:" in printed
  assert -1 not in names["table"]["step"]
  forced = np.load(runs / "trace.regret.npz")
  assert len(forced["change"]) == 3 * experts
  assert "decoder/01: the router chose the best expert for" in printed


@pytest.mark.slow
def test_trace_draws_patches_and_takes_the_devices_that_are_there(capsys, tmp_path):
  """Of a run on 16 devices, where there are 8."""
  config = replaced(digits_config(), {
      "mesh.data": 2, "mesh.expert": 8, "model.num_experts": 8, "train.batch_size": 64})
  workdir = write_run(tmp_path / "run", config)
  code, printed, err = run(capsys, "trace", f"--workdir={workdir}", f"--out={tmp_path}/x.npz", "--records=20")
  assert code == 0, err
  assert "more devices than the 8 here; loaded on data=1, expert=8, model=1" in err
  assert f"with the largest gates: {tmp_path}/x.patches.png" in printed
  assert (tmp_path / "x.patches.png").read_bytes()[:4] == b"\x89PNG"
  code, _, err = run(
      capsys, "trace", f"--workdir={workdir}", f"--out={tmp_path}/x.npz", "--config.mesh.data=2")
  assert code == 2 and "needs 16 devices, but there are 8" in err


def test_train_resumes(runs, capsys):
  code, out, err = run(
      capsys, "train", f"--config={runs}/tiny.py:configs/smoke.py", f"--workdir={runs}/decoder")
  assert code == 0
  assert "already finished: step" in out + err


def test_the_command_line_silences_orbax_for_itself(monkeypatch, capsys, caplog):
  """Importing does not: the loggers are the host program's (tests/test_house.py)."""
  for name in ("absl", "asyncio"):
    caplog.set_level(logging.INFO, logger=name)  # and back, after the test
  monkeypatch.setattr(sys, "argv", ["sparse_experts", "--help"])
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  assert __main__.run() == 0  # not the file itself, which takes Ctrl-C of the process for good
  assert not any(logging.getLogger(name).isEnabledFor(logging.ERROR) for name in ("absl", "asyncio"))


@pytest.mark.parametrize("argv", [
    ["trace", "--workdir={runs}/decoder", "--out={out}", "--records=2"],
    ["report", "--workdir={runs}/decoder", "--no-model", "--out={out}"],
    ["compare", "{runs}/decoder", "{runs}/decoder", "--out={out}"]], ids=lambda argv: argv[0])
def test_a_full_disk_is_one_line_and_leaves_nothing(argv, runs, tmp_path, capsys, monkeypatch):
  out = tmp_path / {"trace": "x.npz", "report": "x.html", "compare": "x.png"}[argv[0]]
  full_disk.fill(monkeypatch)
  code, _, err = run(capsys, *(text.format(runs=runs, out=out) for text in argv))
  assert code == 2
  assert err.splitlines()[-1].startswith(f"error: no space left on the disk of {out}; make room")
  assert "damaged" not in err and not list(tmp_path.iterdir())
