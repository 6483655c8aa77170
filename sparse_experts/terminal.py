"""What is printed: control characters are escaped, and output that cannot be written ends no training."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# All but newline and tab: what moves a cursor, colours, turns the direction of writing or is half a letter.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BROKEN_PIPE = 141  # exit code of a program whose reader has left, in any shell


class Lost(Exception):
  """Results that could not be printed; `closed`: nobody reads them any more."""

  def __init__(self, error: OSError):
    self.closed = error.errno == errno.EPIPE
    super().__init__(f"the output cannot be written ({error.strerror}); make room, or send it elsewhere")


def escaped(text: str) -> str:
  """The text with control characters as `\\u001b`, which JSON reads too; newlines and tabs stay."""
  return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def tell(text: str, stream: TextIO | None = None) -> None:
  """A message for people, on stderr. Where it cannot be written, it is lost."""
  stream = sys.stderr if stream is None else stream
  if stream is not None:  # closed before Python began
    with contextlib.suppress(OSError, ValueError):  # full, gone; closed since
      print(escaped(text), file=stream, flush=True)


def flush() -> None:
  """Writes what is left of stdout and stderr, where that is possible."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()


class Output:
  """A stream whose text is escaped, and which raises Lost, or nothing, where it cannot be written."""

  def __init__(self, stream: Any, forgiving: bool, escape: bool = True):
    self._stream: Any = stream._stream if isinstance(stream, Output) else stream
    self._forgiving, self._escape = forgiving, escape

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with self._tolerated():
      self._stream.write(escaped(text) if self._escape else text)
    return len(text)

  def flush(self) -> None:
    with self._tolerated():
      self._stream.flush()

  @contextlib.contextmanager
  def _tolerated(self) -> Iterator[None]:
    try:
      yield
    except ValueError:  # closed
      pass
    except OSError as e:
      if not self._forgiving:
        raise Lost(e) from None

  def drop(self) -> None:
    """Writes what is left, or drops it: Python would try again at the exit, and complain."""
    try:
      self._stream.flush()
    except (OSError, ValueError):
      with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def guarded(forgiving: bool) -> Iterator[None]:
  """Within the block stdout and stderr are `Output`; forgiving: stdout too raises nothing."""
  with open(os.devnull, "w", encoding="utf-8") as nowhere:
    before = sys.stdout, sys.stderr
    made = Output(sys.stdout or nowhere, forgiving), Output(sys.stderr or nowhere, True)  # None: was closed
    sys.stdout, sys.stderr = made
    try:
      yield
    finally:
      sys.stdout, sys.stderr = before
      for output in made:
        output.drop()


def open_closed_streams() -> None:
  """Opens stdin, stdout and stderr where they are closed, or the next file gets their number and messages."""
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(number)
    except OSError:
      nowhere = os.open(os.devnull, os.O_RDWR)
      os.dup2(nowhere, number)  # which children inherit
      if nowhere != number:
        os.close(nowhere)
    if getattr(sys, name) is None:
      setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  as long as Python
