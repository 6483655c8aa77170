"""The other processes of a run: one per host, each with its own devices."""

import glob
import importlib.util
import os
import sys
import threading

from sparse_experts.errors import UserError

# The same in every process, except the last one.
ADDRESS, COUNT, INDEX = NAMES = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = 30  # seconds without a sign of life of one process after which JAX ends those that wait for it

PATIENCE = 5.0  # seconds


def join() -> None:
  """Waits for the others if there are any; call it before jax is used.

  The environment names them: JAX_COORDINATOR_ADDRESS is host:port of process 0, which serves the others.
  On hosts of a Cloud TPU jax finds them by itself.
  """
  given = [name for name in NAMES if os.environ.get(name)]
  if not given:
    if _has_tpu():
      _join_tpu_hosts()
    return
  if missing := [name for name in NAMES if name not in given]:
    raise UserError(f"{given[0]} is set but {missing[0]} is not; a run of several processes needs "
                    f"{ADDRESS}=host:port, {COUNT} and {INDEX}")
  count, index = (_whole(name) for name in (COUNT, INDEX))
  if index >= count:
    raise UserError(f"{INDEX}={index} is out of range; with {COUNT}={count} choose 0 to {count - 1}")
  if ":" not in os.environ[ADDRESS]:
    raise UserError(f"{ADDRESS}={os.environ[ADDRESS]} has no port; write host:port of process 0")
  import jax

  if not jax.distributed.is_initialized():
    jax.distributed.initialize(os.environ[ADDRESS], count, index, heartbeat_timeout_seconds=HEARTBEAT)


def leave(code: int) -> None:
  """Lets a process that failed end: at once among several, as at a normal exit JAX waits for all the others.

  Alone it has PATIENCE for its exit, in which threads may wait for a disk that takes nothing.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
    os._exit(code)
  timer = threading.Timer(PATIENCE, os._exit, (code,))
  timer.daemon = True
  timer.start()


def _has_tpu() -> bool:
  """Whether jax will find TPU chips in this machine; looked up without jax, which not every command needs."""
  wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu").split(",")
  return wanted and bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")) and (
      importlib.util.find_spec("libtpu") is not None)


def _join_tpu_hosts() -> None:
  import jax

  if jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
  except (ValueError, OSError) as e:  # no cluster that jax knows, or its server does not answer
    print(f"jax finds no other TPU hosts ({str(e)[:60]}); if there are any, set "
          f"{', '.join(NAMES)}", file=sys.stderr)


def _whole(name: str) -> int:
  text = os.environ[name]
  if not text.isdecimal():
    raise UserError(f"{name}='{text}' is not a whole number; give one")
  return int(text)
