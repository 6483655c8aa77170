"""`compile` answers for a TPU that is not there; where its compiler is not, it says how to get it."""

import importlib.util
import json

import pytest

from sparse_experts import cli

TINY = [f"--config.{key}" for key in (
    "model.num_layers=2", "model.embed_dim=128", "model.mlp_dim=128", "model.dispatch=scatter",
    "data.length=128", "train.batch_size=8", "model.group_size=128", "mesh.data=2", "mesh.expert=2")]
ANSWER = 2  # exit code of a mistake


def compiled(capsys, *argv):
  code = cli.main(["compile", "--config=configs/smoke.py", *argv])
  return code, capsys.readouterr()


@pytest.mark.parametrize("argv, words", [
    ((), "compile needs --topology; write for example --topology=v5e:2x4"),
    (("--topology=v6x:2x2",), "chip 'v6x' is unknown; did you mean 'v6e'?"),
    (("--topology=v5e",), "--topology=v5e names no slice; write for example v5e:2x4, or add --find"),
    (("--topology=v5e:2x2", "--find"), "write --topology=v5e, and no --slices"),
    (("--topology=v5e:2x2", "--config.mesh.data=3"), "train.batch_size=16 does not divide"),
])
def test_mistakes(capsys, argv, words):
  code, out = compiled(capsys, *argv)
  assert code == ANSWER
  assert words in out.err and out.err.count("\n") == 1


def test_without_its_compiler(capsys, monkeypatch):
  spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else spec(name))
  code, out = compiled(capsys, "--topology=v5e:2x2")
  assert code == ANSWER
  assert out.err == ("error: --topology=v5e:2x2: compiling for a TPU without one needs libtpu; "
                     "pip install '.[aot]'\n")


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install '.[aot]'")


@needs_libtpu
def test_a_mesh_that_is_not_the_slices(capsys):
  code, out = compiled(capsys, "--topology=v5e:2x2")
  assert code == ANSWER
  assert out.err == ("error: mesh data=1 x expert=1 x model=1 uses 1 devices of 4; set --config.mesh.* or "
                     "let --find look for a mesh\n")


@needs_libtpu
@pytest.mark.slow
def test_a_sparse_layer_on_a_tpu(capsys):
  """Two all-to-alls each way cross the devices; besides them only sums of statistics, of a few numbers."""
  code, out = compiled(capsys, "--topology=v5e:2x2", *TINY, "--json")
  assert code == 0
  found = json.loads(out.out.splitlines()[-1])
  layer = found["per_sparse_layer"]
  assert {phase: c["count"] for phase, c in layer.pop("all-to-all").items()} == {"forward": 2, "backward": 2}
  assert set(layer) <= {"all-reduce"}
  assert all(c["bytes"] < 1000 for c in layer.get("all-reduce", {}).values())
  assert set(found["collectives"]) == {"all-to-all", "all-reduce"}
  assert (found["chips"], found["fits"]) == (4, True)
  assert found["hbm_per_chip_gib"]["peak"] < found["hbm_per_chip_gib"]["usable"] == 15.75
  assert "peak 0." in out.out and "fits" in out.out and "not a measurement" in out.out


@needs_libtpu
@pytest.mark.slow
def test_two_slices(capsys):
  """Rows stay in their slice; gradients cross, and cost time of the data center network."""
  mesh = ("--config.mesh.expert=4", "--config.mesh.dcn.data=2")
  code, out = compiled(capsys, "--topology=v5e:2x2", "--slices=2", *TINY[:-1], *mesh, "--json")
  assert code == 0
  found = json.loads(out.out.splitlines()[-1])
  assert (found["chips"], found["slices"]) == (8, 2)
  # Programs for several slices tell no operation's origin, so there are no figures per sparse layer.
  assert found["collectives"]["all-to-all"]["count"] == 4 and not found["per_sparse_layer"]
  assert found["estimated_step_seconds"]["dcn"] > 0
