"""The size of a pod: 64 devices in two processes and 512 experts, against one device."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from sparse_experts import processes
from tests.training.test_processes import free_address

ROOT = pathlib.Path(__file__).parents[2]
# 64 threads on two cores: a collective may wait longer for its last device than XLA expects.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=150 --xla_cpu_collective_timeout_seconds=150"


def started(out, mesh, devices, address="", count=1, index=0):
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices),
                      "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {PATIENT}"}
  if count > 1:
    env |= dict(zip(processes.NAMES, (address, str(count), str(index)), strict=True))
  command = [sys.executable, ROOT / "tests" / "moe" / "golden_scale.py", out, *map(str, mesh)]
  return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def ended(running):
  said = [process.communicate(timeout=170)[1] for process in running]
  assert not any(process.returncode for process in running), said


@pytest.mark.slow
def test_a_step_of_two_processes_with_64_devices_is_that_of_one_device(tmp_path):
  """Parameters, gradients, output and which tokens were kept; dropping and dropless."""
  ended([started(tmp_path / "one.npz", (1, 1), 1)])
  address = free_address()
  ended([started(tmp_path / "many.npz", (8, 8), 32, address, 2, i) for i in range(2)])
  with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "many.npz") as many:
    assert (many["processes"], many["devices"]) == (2, 64)
    names = set(one) - {"processes", "devices"}
    assert names == set(many) - {"processes", "devices"}
    assert 0.5 < one["scatter[4]"].mean() < 0.95 and one["ragged[4]"].all()  # kept
    for name in names:  # float32 sums of a few thousand terms, taken in another order
      close = 2e-6 * np.abs(one[name]).max()
      np.testing.assert_allclose(many[name].astype(float), one[name], rtol=0, atol=close, err_msg=name)
