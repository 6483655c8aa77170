"""Meshes over one slice and over several."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from sparse_experts import partitioning
from sparse_experts.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  slice_index: int
  device_kind: str = "none"
  platform: str = "none"
  core_on_chip: int = 0


def ids(grid):
  return np.vectorize(lambda d: d.id)(grid).tolist()


def grid(devices, shape, cut):
  slices = partitioning._slices(devices, math.prod(cut), math.prod(shape))
  return ids(partitioning._arrange(slices, shape, cut))


def test_an_axis_is_cut_into_slices_at_its_outer_part():
  """Devices are of slices 0 and 1 in turn; neighbours along an axis that is not cut are of one slice."""
  devices = [Device(i, i % 2) for i in range(8)]
  assert grid(devices, (4, 2, 1), (2, 1, 1)) == [[[0], [2]], [[4], [6]], [[1], [3]], [[5], [7]]]
  assert grid(devices, (2, 4, 1), (1, 2, 1)) == [[[0], [2], [1], [3]], [[4], [6], [5], [7]]]
  assert grid(devices, (2, 2, 1), (2, 1, 1)) == [[[0], [2]], [[1], [3]]], "the first devices of each slice"
  assert grid(devices, (2, 2, 1), (1, 1, 1)) == [[[0], [2]], [[4], [6]]], "one slice is enough"


def test_cores_of_a_v4_chip_may_be_devices():
  devices = [Device(i, 0, "TPU v4", "tpu", i % 2) for i in range(4)]
  assert grid(devices, (2, 2, 1), (2, 1, 1)) == [[[0], [1]], [[2], [3]]]


def test_devices_that_know_no_slice_are_cut_in_their_order():
  mesh = partitioning.make_mesh(2, 4, dcn={"data": 2, "expert": 2})
  assert ids(mesh.devices) == [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
  mesh = partitioning.make_mesh(2, 4, dcn={"expert": 2})
  assert ids(mesh.devices) == [[[0], [1], [4], [5]], [[2], [3], [6], [7]]]
  assert ids(partitioning.make_mesh(2, 4).devices) == ids(jax.make_mesh((2, 4, 1), mesh.axis_names).devices)


@pytest.mark.parametrize("shape, dcn, message", [
    ((4, 2, 1), {}, "the devices are 2 slices of 4, but config.mesh wants 1 of 8; say by config.mesh.dcn .*"),
    ((8, 1, 1), {"data": 4}, "the devices are 2 slices of 4, but config.mesh wants 4 of 2; .*"),
    ((4, 2, 1), {"data": 3}, "mesh.dcn.data=3 does not divide mesh.data=4; choose a divisor"),
    ((4, 2, 1), {"data": 0}, "mesh.dcn.data=0 does not divide mesh.data=4; choose a divisor"),
])
def test_slices_that_do_not_fit(shape, dcn, message):
  with pytest.raises(UserError, match=message):
    partitioning.make_mesh(*shape, devices=[Device(i, i // 4) for i in range(8)], dcn=dcn)


@pytest.mark.parametrize("devices", [1, 4])
def test_platform_is_the_meshs_whatever_machine_compiles(devices):
  with partitioning.use(partitioning.make_mesh(data=devices)):
    assert partitioning.platform() == "cpu"
    here = jax.sharding.get_abstract_mesh().abstract_device
  there = type(here)("TPU v5 lite", 1, "tpu")
  mesh = AbstractMesh((devices, 1, 1), partitioning.MESH_AXES, (AxisType.Auto,) * 3, abstract_device=there)
  with jax.sharding.use_abstract_mesh(mesh):
    assert partitioning.platform() == "tpu"
