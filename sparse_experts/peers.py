"""What the processes of a run tell each other: that they live, how they ended, and on what they differ.

They do so through the server that joins them, which needs no device: it answers while a step waits for one
that is gone.
"""

import collections
import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparse_experts import terminal
from sparse_experts.errors import UserError

COME = 300  # seconds in which all processes have to come
LOST = 30  # seconds without a sign of life of one process after which the others end
BEAT = 2  # seconds between signs of life
_MOST = 4  # differences that are shown

_Facts = Mapping[str, Any]
_handlers: list[Any] = []  # kept, as the system calls them


class Peers:
  """The processes of this run; this one is number `index` of `count`.

  client: jax's, of the server at `address` that joins them.
  """

  def __init__(self, client: Any, index: int, count: int, address: str | None = None):
    self.index, self._client, self._count, self._address = index, client, count, address
    self._seen: dict[int, tuple[_Facts, float]] = {}  # process -> its last state, and when it changed
    self._compared, self._told, self._lock = 0, False, threading.Lock()

  def watch(self) -> None:
    """From now on this process ends, with a line, soon after another one failed or died."""
    _end_on_abort(self._server_is_gone)
    threading.Thread(target=self._watch, name="peers", daemon=True).start()

  def tell(self, message: str) -> None:
    """That this process ends because of `message`; the others end with the same line."""
    with self._lock:
      self._told = True
      with contextlib.suppress(Exception):  # the server may be what is gone
        self._client.key_value_set(f"state/{self.index}", json.dumps({"ended": message}), True)

  def failed(self, e: BaseException) -> None:
    """Tells of an exception, unless it is what the end of another process looks like from here."""
    if not isinstance(e, UserError) and _is_of_runtime(e):
      time.sleep(LOST + 2 * BEAT)  # by then the watching thread has ended this process, and named the other
    message = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
    self.tell("interrupted" if isinstance(e, KeyboardInterrupt) else message)

  def leave(self, code: int) -> None:
    """Ends a process that has told why: at a normal exit jax waits for all the others, which may hang."""
    if not self._told:
      return
    until = time.monotonic() + 3 * BEAT
    while self.index == 0 and time.monotonic() < until:  # this process serves them: they have to hear it
      with contextlib.suppress(Exception):
        if all("ended" in state for state in self._states().values()):
          break
      time.sleep(0.1)
    terminal.flush()
    os._exit(code)

  def compare(self, what: str, facts: _Facts, seconds: float = COME) -> None:
    """Raises UserError in all processes if `facts` differ in one; waits until each has come to this call."""
    self._compared += 1
    folder = f"compare/{self._compared}"
    text = json.dumps([what, facts], default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    self._client.key_value_set(f"{folder}/value/{self.index}", text)
    self._client.key_value_set(f"{folder}/digest/{self.index}", digest)
    try:
      self._client.wait_at_barrier(folder, int(1000 * seconds))
    except Exception as e:
      there = self._all(f"{folder}/digest")
      missing = [i for i in range(self._count) if i not in there]
      raise UserError(f"{_names(missing, self._count)} did not come to compare {what} within {seconds:g} "
                      "seconds; see its log, and start all again") from e
    if len(set(self._all(f"{folder}/digest").values())) > 1:
      found = {i: json.loads(value) for i, value in self._all(f"{folder}/value").items()}
      raise UserError(difference([{"compared": found[i][0]} | found[i][1] for i in sorted(found)]))

  def of_first(self, text: str, seconds: float = COME) -> str:
    """`text` of process 0, in all processes."""
    self._compared += 1
    key = f"first/{self._compared}"
    if self.index == 0:
      self._client.key_value_set(key, text)
    return self._client.blocking_key_value_get(key, int(1000 * seconds))

  def _all(self, folder: str) -> dict[int, str]:
    return {int(name.rpartition("/")[2]): value for name, value in self._client.key_value_dir_get(folder)}

  def _states(self) -> dict[int, dict[str, Any]]:
    return {i: json.loads(text) for i, text in self._all("state").items()}

  def _watch(self) -> None:
    answered = time.monotonic()
    for beat in range(sys.maxsize):
      with self._lock:
        if self._told:
          return
        try:
          self._client.key_value_set(f"state/{self.index}", json.dumps({"beat": beat}), True)
          states = self._states()
        except Exception:
          states = None
      now = time.monotonic()
      if states is not None:
        answered = now
        for i, state in states.items():
          if self._seen.get(i, ({}, now))[0] != state:
            self._seen[i] = state, now
        if why := reason(self._seen, now, self.index, self._count):
          self._end(why)
      elif now - answered > LOST:
        self._end(self._server_is_gone() or f"{_names([0], self._count)}, which serves the others, did not "
                  f"answer for {LOST} seconds; see its log, and start all again")
      time.sleep(BEAT)

  def _end(self, why: str) -> None:
    """Ends the process from a thread: the main one may wait for ever for the one that is gone."""
    time.sleep(BEAT / 2)  # it may be about to end by itself, for the same reason
    if not self._told:
      self.tell(why)
      terminal.tell(f"error: {' '.join(why.split())}")
      self.leave(2)
    time.sleep(LOST)  # the main thread leaves

  def _server_is_gone(self) -> str | None:
    """The line to end with if process 0 answers no more."""
    if self.index == 0 or not self._address or answers(self._address):
      return None
    return f"{_names([0], self._count)}, which serves the others, is gone; see its log, and start all again"


def reason(seen: Mapping[int, tuple[_Facts, float]], now: float, index: int, count: int) -> str | None:
  """Why process `index` has to end, if it has: another one ended, or gave no sign of life for LOST seconds.

  seen: process -> (its state, when that changed last).
  """
  for i, (state, _) in sorted(seen.items()):
    if i != index and "ended" in state:
      names_one = re.match(r"process(es)? \d", state["ended"])
      return state["ended"] if names_one else f"{_names([i], count)} ended: {state['ended']}"
  lost = [i for i, (state, since) in sorted(seen.items()) if i != index and now - since > LOST]
  if lost:
    return (f"{_names(lost, count)} gave no sign of life for {LOST} seconds; see the log there, and start "
            "all again: a run resumes from its last checkpoint")
  return None


def difference(facts: Sequence[_Facts]) -> str:
  """The line that names the processes that differ from most others (from the first, if none are more)."""
  texts = [json.dumps(of, default=str) for of in facts]
  counted = collections.Counter(texts)
  usual = max(texts, key=lambda text: (counted[text], -texts.index(text)))
  like = texts.index(usual)
  odd = [i for i, text in enumerate(texts) if text != usual]
  theirs, ours = facts[odd[0]], facts[like]
  names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
  show = lambda of, name: _short(of[name]) if name in of else "unset"
  shown = ", ".join(f"{name} is {show(theirs, name)} there and {show(ours, name)} in process {like}"
                    for name in names[:_MOST])
  more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
  return (f"{_names(odd, len(facts))} {'differ' if len(odd) > 1 else 'differs'}: {shown}{more}; start all "
          "processes by the same command, with the same files")


def answers(address: str) -> bool:
  """Whether a server listens at host:port."""
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
  except (OSError, ValueError):
    return False
  return True


@contextlib.contextmanager
def coming(address: str = "", index: int = 0, count: int = 0) -> Iterator[None]:
  """Ends this process if the block, in which jax waits for all to come, takes longer than COME seconds.

  count: 0 where jax finds the others by itself.
  """

  def end() -> None:
    who = f"process {index} of {count}: not all others have" if count else "not all other processes have"
    if address and index and not answers(address):
      who = f"process {index} of {count}: process 0, which serves the others at {address}, has not"
    terminal.tell(f"error: {who} come within {COME} seconds; start the same command on every host, and see "
                  "the logs")
    os._exit(2)

  timer = threading.Timer(COME, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _end_on_abort(why: Any) -> None:
  """If jax's runtime aborts this process, `why()` is its last line, and the code 2; unless it is None."""

  def end(_: int) -> None:
    if line := why():
      terminal.tell(f"error: {line}")
      os._exit(2)

  _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(end))
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _handlers[-1])


def _is_of_runtime(e: BaseException) -> bool:
  """Whether an exception comes from jax's runtime or from the collectives on CPUs."""
  return type(e).__name__ == "JaxRuntimeError" or "Gloo" in str(e)


def _names(processes: Sequence[int], count: int) -> str:
  numbers = ", ".join(map(str, processes[:8])) + ", ..." * (len(processes) > 8)
  return f"process{'es' * (len(processes) > 1)} {numbers} of {count}"


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 120 else text[:117] + "..."
