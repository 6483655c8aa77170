"""Arrays are faulted in once, not once a step."""

import os
import subprocess
import sys

import pytest

# Pages that 20 calls of a program touch for the first time, after 20 others; its result has 64 MiB.
SCRIPT = """
import ctypes, resource, sys
from sparse_experts import host_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages, where they are on, are few
if "keep" in sys.argv:
  host_memory.keep()
import jax, jax.numpy as jnp
twice, one = jax.jit(lambda a: 2 * a), jnp.ones(2**24, jnp.float32)
faults = []
for _ in range(40):
  twice(one).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[19])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another malloc")
def test_memory_is_faulted_in_once():
  env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
  faults = lambda env, *argv: int(subprocess.run(
      [sys.executable, "-c", SCRIPT, *argv], env=env, capture_output=True, text=True, check=True).stdout)
  pages = 20 * 2**26 // os.sysconf("SC_PAGE_SIZE")
  assert faults(env) >= pages  # so the test can tell
  assert faults(env, "keep") < pages / 4  # now and then the last result is not free yet, and one more is made
  assert faults(env | {"MALLOC_ARENA_MAX": "4"}, "keep") >= pages  # the user's word wins
