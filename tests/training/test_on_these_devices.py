"""A run of a larger mesh is looked at with the devices that are there: 8 simulated ones."""

import pytest

from sparse_experts.config import default_config, replaced
from sparse_experts.training.run import on_these_devices


@pytest.mark.parametrize("mesh, expected", [
    ((2, 4, 1), (2, 4, 1)), ((16, 1, 1), (1, 1, 1)), ((4, 16, 1), (1, 8, 1)), ((8, 4, 4), (1, 4, 2)),
    ((1, 6, 4), (1, 2, 4))])
def test_the_mesh_is_cut_down_to_what_there_is(mesh, expected):
  config = replaced(default_config(), dict(zip(("mesh.data", "mesh.expert", "mesh.model"), mesh)))
  config = replaced(config, {"mesh.dcn.data": mesh[0] // 8 or 1, "mesh.fsdp": True})
  found = on_these_devices(config)
  assert (found.mesh.data, found.mesh.expert, found.mesh.model) == expected and found.mesh.fsdp
  assert found is config or found.mesh.dcn.data == 1
