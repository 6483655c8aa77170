"""A run may lie in any folder that the file system takes: no library takes its path for a pattern."""

import gc
import os
import tempfile

import jax
import numpy as np
import pytest

from sparse_experts import cli
from sparse_experts.config import replaced
from sparse_experts.errors import UserError
from sparse_experts.training import init_from
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.checkpoints.mapped import restore_mapped
from sparse_experts.training.checkpoints.plain import PlainPath
from sparse_experts.training.loop import train
from sparse_experts.training.run import load
from tests.texts import write_texts
from tests.training.tiny import documents, tiny_config

ODD = "run[lr=0.1] *?\\{a,b}%20#$x$ \"q\" 'é日本'&;!"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
  """A run of two steps on the text next to it, both below a folder of all odd characters."""
  folder = tmp_path_factory.mktemp("odd") / ODD
  folder.mkdir()
  write_texts(folder / "text", documents())
  workdir = str(folder / ODD)
  train(tiny_config(train__steps=2, data__source=f"files:{folder}/text", data__valid_share=0.3), workdir)
  return workdir


def links():
  gc.collect()
  return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("sparse_experts-")}


@pytest.mark.slow
def test_a_run_is_read_and_resumed(odd, tmp_path):
  before, run = links(), load(odd)
  with Checkpoints(wd.checkpoints(odd)) as checkpoints:
    mapped = restore_mapped(checkpoints, ("params",), 2, str(tmp_path))
    np.testing.assert_array_equal(mapped["params/embedding/table"], run.params["embedding"]["table"])
  resumed = train(replaced(run.config, {"train.steps": 3}), odd)
  assert resumed.step == 3 and sorted(os.listdir(wd.checkpoints(odd))) == ["2", "3"]
  assert sorted(os.listdir(os.path.dirname(odd))) == sorted([ODD, "text"]), "nothing was written next to it"
  assert init_from.parse(f"{odd}@2") == (odd, 2)
  del checkpoints
  assert links() <= before, "links do not stay"
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.params), jax.device_get(load(odd, 2).params))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # a picture has boxes for such letters
def test_every_command_reads_it(odd, tmp_path, capsys):
  out = str(tmp_path / "x[1].npz")
  for argv in (["evaluate", f"--workdir={odd}", "--json"], ["sample", f"--workdir={odd}", "--prompt=def"],
               ["trace", f"--workdir={odd}", f"--out={out}", "--records=2"],
               ["report", f"--workdir={odd}", "--no-model"],
               ["compare", odd, odd, f"--out={out}.png"]):
    assert cli.main(argv) == 0, capsys.readouterr().err
  assert os.path.getsize(out) and os.path.getsize(f"{out}.png") and os.path.getsize(f"{odd}/report.html")


def test_a_path_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
  assert PlainPath(str(tmp_path)).path == str(tmp_path)
  strange = tmp_path / "a[b]"
  strange.mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(strange))
  with pytest.raises(UserError, match="and the folder of temporary files, .* or set TMPDIR"):
    PlainPath(str(strange))
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
  with pytest.raises(UserError, match="cannot be made .*; name the workdir with letters"):
    PlainPath(str(strange))
  with pytest.raises(UserError, match="is not UTF-8; choose another name"):
    train(tiny_config(), str(tmp_path / os.fsdecode(b"\xff")))
