"""Damaged folders of runs: a page, or one line; never a wait."""

import os
import re

import pytest

from sparse_experts import cli
from tests.report.made_up import write_run


def report(run):
  return cli.main(["report", f"--workdir={run}", "--no-model", f"--out={run.parent}/page.html"])


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_pipe_is_not_waited_for(tmp_path, capsys, name):
  write_run(tmp_path / "run", rows=2)
  (tmp_path / "run" / name).unlink()
  os.mkfifo(tmp_path / "run" / name)
  assert report(tmp_path / "run") == 2
  err = capsys.readouterr().err
  assert f"{name} is no file; restore it" in err and err.count("\n") == 1


def test_a_pipe_as_the_table_of_a_sweep_is_none(tmp_path):
  from sparse_experts.report.groups import read_table

  os.mkfifo(tmp_path / "table.md")
  assert read_table(str(tmp_path)) is None


def test_a_link_to_itself_leaves_nothing_open(tmp_path):
  """pytest would say which iterator over a folder was not closed."""
  write_run(tmp_path / "run", rows=2)
  (tmp_path / "run" / "tokenizer.model").symlink_to("tokenizer.model")
  assert report(tmp_path / "run") == 0


@pytest.mark.parametrize("value", ["NaN", '"x"', "null", "[1]"])
def test_balance_that_is_no_number_leaves_its_columns_empty(tmp_path, value):
  figure = re.compile(r'("router/decoder/01/(dead|dropped)": )[0-9.e-]+')
  for name in ("one", "other"):
    path = write_run(tmp_path / name, rows=2, layers=["decoder/01"]) / "metrics.jsonl"
    path.write_text(figure.sub(rf"\g<1>{value}", path.read_text()))
  together = lambda *names: cli.main(
      ["report", f"--out={tmp_path}/x.html", "--workdir", *(str(tmp_path / name) for name in names)])
  assert together("one", "other") == 0
  assert '<td class="n">-</td>' in (tmp_path / "x.html").read_text()
  write_run(tmp_path / "dense", rows=2, keys={"model.num_experts": 0})  # as its config says, the log does not
  assert together("one", "dense") == 0


def test_half_a_letter_in_a_row_is_drawn_as_its_escape(tmp_path):
  write_run(tmp_path / "run", rows=2)
  path = tmp_path / "run" / "metrics.jsonl"
  path.write_text(path.read_text().replace('"device": "cpu"', '"device": "\\ud800"'))
  assert report(tmp_path / "run") == 0
  assert "\\ud800" in (tmp_path / "page.html").read_text()
