"""What killed conversions leave is removed; what living ones need stays."""

import json
import os
import socket
import subprocess
import sys

import pytest

from sparse_experts.convert import read as reading
from sparse_experts.convert.staging import clear, make_staging
from sparse_experts.convert.write import write
from sparse_experts.errors import UserError
from sparse_experts.training.run import load
from tests.convert.checkpoints import DATA


def test_folders_of_the_dead_go(tmp_path):
  dead = subprocess.Popen([sys.executable, "-c", ""])
  dead.wait()
  here = socket.gethostname()
  gone = [f"converting-{here}-{dead.pid}-abc", "converting-8charact"]
  stay = [f"converting-{here}-{os.getpid()}-abc", "converting-else.where-1-abc", "model.safetensors"]
  for name in gone + stay:
    (tmp_path / name).mkdir()
    (tmp_path / name / "0").write_text("x")
  clear(str(tmp_path))
  assert sorted(os.listdir(tmp_path)) == sorted(stay)
  with make_staging(str(tmp_path)) as mine:
    clear(str(tmp_path))
    assert os.path.isdir(mine)
  clear(str(tmp_path / "not there"))


@pytest.mark.parametrize("moment", ["save_mapped", "keep", "replace"])
def test_a_conversion_that_was_killed_is_begun_again(tmp_path, monkeypatch, moment):
  """Also by a kill between the config and the checkpoint, which makes it a run."""
  def killed(*args, **kwargs):
    raise KeyboardInterrupt

  places = {"save_mapped": (reading, "save_mapped"), "keep": (reading.wd, "keep"), "replace": (reading, "os")}
  with monkeypatch.context() as patch:
    if moment == "replace":
      patch.setattr(reading.os, "replace", lambda a, b, move=os.replace: (
          killed() if b.endswith("checkpoints") else move(a, b)))
    else:
      patch.setattr(*places[moment], killed)
    with pytest.raises(KeyboardInterrupt):
      reading.read(str(DATA / "mixtral"), str(tmp_path))
  (tmp_path / "converting-leftover").mkdir()
  with pytest.raises(UserError):
    load(str(tmp_path))
  reading.read(str(DATA / "mixtral"), str(tmp_path))
  assert load(str(tmp_path)).step == 0
  assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.json", "run.json", "tokenizer.model"]
  with pytest.raises(UserError, match="holds a run; name another folder"):
    reading.read(str(DATA / "mixtral"), str(tmp_path))


def test_an_edited_config_is_not_written_as_another_model(tmp_path):
  reading.read(str(DATA / "mixtral"), str(tmp_path / "run"))
  path = tmp_path / "run" / "config.json"
  theta = json.loads(path.read_text())["model"]["rope"]["theta"]
  path.write_text(path.read_text().replace(f'"theta": {theta}', f'"theta": {theta + 1}'))
  with pytest.raises(UserError, match=f"another config: model.rope.theta={theta} there and {theta + 1} here"):
    write(str(tmp_path / "run"), str(tmp_path / "out"), "mixtral")
  assert not (tmp_path / "out").exists()
