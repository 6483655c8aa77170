"""Processes in other environments, which end with this one: to run once, or to ask line by line."""

import contextlib
import json
import os
import select
import signal
import subprocess
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_experts.errors import UserError

PATIENCE = 10  # seconds


def run(command: Sequence[str], seconds: float, environ: Mapping[str, str], folder: str | None = None) -> str:
  """What the command prints. Raises UserError with its last error if it fails, or after `seconds`."""
  process = _start(command, environ, folder, subprocess.DEVNULL, subprocess.PIPE)
  try:
    out, err = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    raise UserError(f"{_name(command)} took more than {seconds:.0f} s") from None
  finally:
    end(process)
  if process.returncode:
    raise UserError(f"{_name(command)}: {reason(err.decode(errors='replace'), process.returncode)}")
  return out.decode()


def _start(command: Sequence[str], environ: Mapping[str, str], folder: str | None, stdin: int, stderr: int
           ) -> subprocess.Popen:
  # A group of its own: Ctrl-C comes to us alone, and `end` reaches what it has started too.
  return subprocess.Popen(command, env=dict(environ), cwd=folder, stdin=stdin, stdout=subprocess.PIPE,
                          stderr=stderr, start_new_session=True)


def end(process: subprocess.Popen) -> None:
  """Ends a process and what it has started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  for stream in (process.stdin, process.stdout, process.stderr):
    if stream is not None:
      with contextlib.suppress(OSError):
        stream.close()


def reason(log: str, code: int) -> str:
  """Why a process ended, on one line: the signal, else the last error of its log, Python's or pip's."""
  if code < 0:
    return f"ended by {signal.Signals(-code).name}" + "; memory may be short" * (code == -signal.SIGKILL)
  lines = [line.strip() for line in log.splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith("ERROR:") or line.partition(":")[0].endswith("Error")]
  text = (errors or lines or [f"ended with code {code}"])[-1]
  return textwrap.shorten(text.removeprefix("ERROR:").strip(), 200, placeholder=" ...")


def _name(command: Sequence[str]) -> str:
  return " ".join(map(os.path.basename, command[:3]))


class Worker:
  """A process in `folder` that answers a line with a line of JSON; its stderr goes to a file `log` there."""

  def __init__(self, command: Sequence[str], environ: Mapping[str, str], folder: str, log: str):
    self._log = os.path.join(folder, log)
    fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
      self._process = _start(command, environ, folder, subprocess.PIPE, fd)
    finally:
      os.close(fd)
    self._read = b""

  def ask(self, line: str | None, seconds: float) -> dict[str, Any]:
    """The answer; of None, what it says by itself. Raises UserError if it has died, or after `seconds`."""
    if line is not None:
      assert self._process.stdin is not None
      with contextlib.suppress(BrokenPipeError):  # its answer is missing too
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
    return json.loads(self._line(time.monotonic() + seconds))

  def _line(self, until: float) -> bytes:
    assert self._process.stdout is not None
    fd = self._process.stdout.fileno()
    while b"\n" not in self._read:
      ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
      if not ready:
        self.end()
        raise UserError("no answer in time")
      if not (more := os.read(fd, 1 << 16)):
        with contextlib.suppress(subprocess.TimeoutExpired):
          self._process.wait(PATIENCE)  # for its own code
        self.end()
        with open(self._log, encoding="utf-8", errors="replace") as f:
          raise UserError(reason(f.read(), self._process.returncode))
      self._read += more
    line, _, self._read = self._read.partition(b"\n")
    return line

  def end(self) -> None:
    end(self._process)
