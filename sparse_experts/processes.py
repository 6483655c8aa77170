"""The other processes of a run: one per host, each with its own devices."""

import contextlib
import glob
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sparse_experts import peers, terminal
from sparse_experts.errors import UserError

# The same in every process, except the last one.
ADDRESS, COUNT, INDEX = NAMES = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_peers: peers.Peers | None = None  # once this process joined others

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
    with peers.coming(os.environ[ADDRESS], index, count):
      jax.distributed.initialize(os.environ[ADDRESS], count, index, **_timeouts())
    _watch()


def compare(what: str, facts: Callable[[], Mapping[str, Any]], seconds: float = peers.COME) -> None:
  """Raises UserError, in all processes, if `facts()` differ in one of them; nothing where there is one only.

  All processes have to call it, within `seconds` of each other.
  """
  if _peers is not None:
    _peers.compare(what, facts(), seconds)


def are_alone() -> bool:
  """Whether there are no other processes."""
  return _peers is None


def is_first() -> bool:
  """Whether this is process 0, or the only one."""
  return _peers is None or _peers.index == 0


def of_first(text: str) -> str:
  """`text` of process 0, in all processes."""
  return text if _peers is None else _peers.of_first(text)


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """Tells the other processes why the block failed in this one, so that they need not wait for it."""
  try:
    yield
  except BaseException as e:
    if _peers is not None:
      _peers.failed(e)
    raise


def leave(code: int) -> None:
  """Lets a process that failed end: among several at once, as at a normal exit jax waits for all the others.

  Alone it has PATIENCE for its exit, in which threads may wait for a disk that takes nothing.
  """
  if _peers is not None:
    _peers.leave(code)
    return
  terminal.flush()
  timer = threading.Timer(PATIENCE, os._exit, (code,))
  timer.daemon = True
  timer.start()


def _watch() -> None:
  from jax._src.distributed import global_state as joined  # there is no public way to the server's values

  global _peers
  if joined.num_processes > 1:
    _peers = peers.Peers(joined.client, joined.process_id, joined.num_processes, joined.coordinator_address)
    _peers.watch()


def _timeouts() -> dict[str, Any]:
  """Those of jax, which end a process with many lines: longer than ours."""
  return {"initialization_timeout": 2 * peers.COME, "heartbeat_timeout_seconds": 4 * peers.LOST}


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
    with peers.coming():
      jax.distributed.initialize(**_timeouts())
  except (ValueError, OSError) as e:  # no cluster that jax knows, or its server does not answer
    terminal.tell(f"jax finds no other TPU hosts ({str(e)[:60]}); if there are any, set {', '.join(NAMES)}")
  else:
    _watch()


def _whole(name: str) -> int:
  text = os.environ[name]
  if not text.isdecimal():
    raise UserError(f"{name}='{text}' is not a whole number; give one")
  return int(text)
