"""A run of a larger mesh is looked at with the devices that are there: 8 simulated ones."""

import json
import shutil

import pytest

from sparse_experts import cli
from sparse_experts.config import default_config, replaced
from sparse_experts.training.run import load, on_these_devices


@pytest.mark.parametrize("mesh, expected", [
    ((2, 4, 1), (2, 4, 1)), ((16, 1, 1), (1, 1, 1)), ((4, 16, 1), (1, 8, 1)), ((8, 4, 4), (1, 4, 2)),
    ((1, 6, 4), (1, 2, 4))])
def test_the_mesh_is_cut_down_to_what_there_is(mesh, expected):
  config = replaced(default_config(), dict(zip(("mesh.data", "mesh.expert", "mesh.model"), mesh)))
  config = replaced(config, {"mesh.dcn.data": mesh[0] // 8 or 1, "mesh.fsdp": True})
  found = on_these_devices(config)
  assert (found.mesh.data, found.mesh.expert, found.mesh.model) == expected and found.mesh.fsdp
  assert found is config or found.mesh.dcn.data == 1


def test_load_and_commands_say_so(whole, tmp_path, capsys):
  run = tmp_path / "run"
  shutil.copytree(whole[0], run)
  config = json.loads((run / "config.json").read_text())
  config["mesh"]["data"], config["mesh"]["model"] = 8, 2
  (run / "config.json").write_text(json.dumps(config))
  said = "the run's mesh has more devices than the 8 here; loaded on data=1, expert=1, model=2\n"
  assert load(str(run)).step == 4 and capsys.readouterr().err == said
  assert cli.main(["sample", f"--workdir={run}", "--prompt=def", "--length=2"]) == 0
  assert capsys.readouterr().err == said
  assert cli.main(["evaluate", f"--workdir={run}"]) == 2  # on the list that it was trained on
  err = capsys.readouterr().err
  assert err.startswith(said) and "trained on data given as list" in err
