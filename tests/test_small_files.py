"""One reader for the small files of a run: its bytes, or one line; and what becomes of them in training."""

import json
import os
import shutil

import pytest

from sparse_experts import cli
from sparse_experts.config import to_json
from sparse_experts.errors import UserError
from sparse_experts.results import read_result
from sparse_experts.small_files import Damaged, read_bytes, read_json, read_text, set_aside
from sparse_experts.sweeps.train import _noted
from sparse_experts.training.log import Log
from sparse_experts.training.metrics import JsonLines
from tests.training.tiny import tiny_config

ROW = {"step": 1, "loss": 2.0, "seconds_per_step": 0.1, "tokens_per_second": 9.0}
LAST = {"step": 4, "eval/final/nats_per_byte": 2.0, "measure": "m", "data_fingerprint": "d"}


def make_folder(path):
  path.mkdir()
  (path / "inside").write_text("x")


BAD = {  # what may have the name of a JSON file
    "a folder": make_folder, "a pipe": os.mkfifo, "zeros": lambda path: path.write_bytes(b"\0" * 64),
    "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'), "empty": lambda path: path.touch(),
    "a number": lambda path: path.write_text("7"), "a list": lambda path: path.write_text("[1]"),
    "cut off": lambda path: path.write_text('{"a": 1'), "brackets": lambda path: path.write_text("[" * 10**5),
    "digits": lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"),
    "a loop": lambda path: path.symlink_to(path.name), "utf-16": lambda path: path.write_bytes(
        '{"a": 1}'.encode("utf-16"))}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_json_object_is_damaged_in_one_line(tmp_path, bad):
  path = tmp_path / "file.json"
  BAD[bad](path)
  with pytest.raises(Damaged, match=r"file.json .*; restore it$") as e:
    read_json(str(path), "restore it")
  assert len(str(e.value)) < 400 + len(str(path)) and "\n" not in str(e.value)


def test_what_is_whole_is_read(tmp_path):
  path = tmp_path / "file.json"
  path.write_text('{"a": "é"}')
  assert read_json(str(path), "") == {"a": "é"} and read_text(str(path), "") == '{"a": "é"}'
  (tmp_path / "link").symlink_to("file.json")
  assert read_bytes(str(tmp_path / "link"), "") == path.read_bytes()
  for gone in ("none", "none/below", "file.json/below"):
    with pytest.raises(FileNotFoundError):
      read_bytes(str(tmp_path / gone), "")


def test_aside_never_takes_the_place_of_something(tmp_path):
  for _ in range(3):
    (tmp_path / "x").write_text("x")
    set_aside(str(tmp_path / "x"))
  assert sorted(os.listdir(tmp_path)) == ["damaged-x", "damaged-x.2", "damaged-x.3"]


# metrics.jsonl


LINES = [b"7\n", b"[]\n", b"null\n", b"\xff\xfe\n", b"\0" * 30 + b"\n", b'{"loss": 1}\n', b'{"step": "2"}\n',
         b'{"step": 2\n', b"[" * 100_000 + b"\n", b"\n", b'{"step": true}\n']


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:12]))
def test_a_damaged_line_is_named_and_the_others_stay(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  rows = [json.dumps(ROW | {"step": step}).encode() + b"\n" for step in (1, 2, 3)]
  path.write_bytes(rows[0] + line + b"".join(rows[1:]))
  (tmp_path / "config.json").write_text(to_json(tiny_config()))
  with pytest.raises(Damaged, match="metrics.jsonl: line 2 is damaged; restore it, or run the same `train`"):
    read_result(str(tmp_path))
  before = path.read_bytes()
  log = JsonLines(str(path), 2)
  log.close()
  assert log.damage.endswith("has 1 damaged line; kept aside as damaged-metrics.jsonl, the other rows stay")
  assert path.read_bytes() == b"".join(rows[:2])
  assert (tmp_path / "damaged-metrics.jsonl").read_bytes() == before
  assert [row["step"] for row in read_result(str(tmp_path)).rows] == [1, 2]


@pytest.mark.parametrize("end", [b"", b'{"step": 3', b"\0" * 4000, b"\xff"])
def test_an_end_cut_off_by_a_kill_is_no_damage(tmp_path, end):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(json.dumps(ROW).encode() + b"\n" + end)
  log = JsonLines(str(path), 2)
  log.close()
  assert not log.damage and path.read_bytes() == json.dumps(ROW).encode() + b"\n"
  assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_folders_and_files_in_the_place_of_one_another(tmp_path, capsys):
  """metrics.jsonl is a folder and tensorboard a file: a run logs all the same."""
  make_folder(tmp_path / "metrics.jsonl")
  (tmp_path / "tensorboard").write_text("x")
  about = {"tokens_per_step": 8, "layers": {}}
  log = Log(str(tmp_path), tiny_config(), 0, {}, about)
  log.write(ROW)
  log.close()
  err = capsys.readouterr().err
  assert "metrics.jsonl is a folder; kept aside as damaged-metrics.jsonl" in err
  assert "tensorboard is no folder; kept aside as damaged-tensorboard" in err
  assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 2.0
  assert (tmp_path / "damaged-metrics.jsonl/inside").exists() and list((tmp_path / "tensorboard").iterdir())


# What reads finished runs


@pytest.fixture
def runs(tmp_path):
  for seed in (0, 1):
    folder = tmp_path / "runs" / str(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(tiny_config(train__seed=seed)))
    rows = [ROW, ROW | {"step": 4}, LAST]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return tmp_path / "runs"


def answer(*argv):
  return cli.main(list(map(str, argv)))


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "diverged.json", "runs.json"])
@pytest.mark.parametrize("bad", ["a folder", "zeros", "no UTF-8", "a number", "brackets", "cut off"])
def test_compare_and_report_answer_in_one_line(runs, tmp_path, capsys, name, bad):
  path = runs / name if name == "runs.json" else runs / "0" / name
  if path.exists():
    path.unlink()
  if name == "diverged.json":  # is asked for where there is no final figure
    (runs / "0" / "metrics.jsonl").unlink()
  BAD[bad](path)
  if name == "metrics.jsonl" and path.is_file():
    path.write_bytes(path.read_bytes() + b"\n")
  assert answer("compare", runs, runs) == 2
  assert capsys.readouterr().err.count("\n") == 1
  code = answer("report", f"--workdir={runs}", f"--out={tmp_path}/r.html", "--no-model")
  err = capsys.readouterr().err
  assert code in (0, 2) and "Traceback" not in err and err.count("\n") <= 1
  shutil.rmtree(runs)


@pytest.mark.parametrize("content", ["", "[1]", '{"seconds": "x"}', "\0", '{"seconds": []}'])
def test_a_damaged_note_of_a_sweep_costs_an_estimate_only(tmp_path, content):
  (tmp_path / "recipe.json").write_text(content)

  class Job:
    workdir = str(tmp_path)

  assert _noted(Job) == 0.0


def test_figures_that_are_no_numbers_are_none(runs):
  path = runs / "0" / "metrics.jsonl"
  path.write_text(path.read_text().replace('nats_per_byte": 2.0', 'nats_per_byte": "two"'))
  assert not read_result(str(runs / "0")).finished
  with pytest.raises(UserError, match="is not finished"):
    from sparse_experts.analysis import compare
    compare.check([compare.read_group(str(runs))])
