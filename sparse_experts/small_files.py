"""Reads the small files of a run's folder: whole and of their form, or one line that says what is wrong.

A file of another form than was written is damaged and may be set aside. An error of the machine (too many
open files, a stale handle, no memory) is no damage: reading is tried again, then the error is told and
nothing is moved.
"""

import errno
import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sparse_experts import storage
from sparse_experts.errors import UserError

T = TypeVar("T")

WAITS = (0.05, 0.2, 0.8)  # seconds before each further try
MOST_BYTES = 1 << 30  # of a small file
ASIDE = "damaged-"  # in front of a name
_OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
# tensorstore's words for files that are not what it wrote; other words in capitals are of the machine.
_DAMAGE = {"NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT"}


class Damaged(UserError):
  """A file or a checkpoint is not what was written."""


def of_the_machine(error: Exception) -> bool:
  """Whether an error says nothing about the file: the same file may be read later, or elsewhere."""
  if isinstance(error, OSError):
    return error.errno not in _OF_THE_FILE
  word = str(error).partition(":")[0]
  has_status = word.isupper() and word.replace("_", "").isalpha()
  return isinstance(error, MemoryError) or (
      has_status and (isinstance(error, RuntimeError) or word not in _DAMAGE))


def reason(error: BaseException) -> str:
  """An error in one line of at most 200 characters."""
  text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  text = " ".join(text.partition("[tensorstore_spec=")[0].split()) or type(error).__name__
  return text if len(text) <= 200 else f"{text[:90]} ... {text[-100:]}"


def patiently(read: Callable[[], T], what: str) -> T:
  """read(), tried again after an error of the machine; if that lasts, a UserError about `what`.

  Other errors of `read` pass through.
  """
  tries = len(WAITS) + 1
  for n in range(tries):
    try:
      return read()
    except Exception as e:  # tensorstore and jax raise many types
      if not of_the_machine(e):
        raise
      if isinstance(e, PermissionError) or str(e).startswith("PERMISSION_DENIED"):
        raise UserError(f"{what} cannot be read ({reason(e)}); mend its permissions") from None
      if n == tries - 1:
        raise UserError(f"{what} cannot be read ({reason(e)}), tried {tries} times; nothing was moved: mend "
                        "that and run the same command again") from None
    time.sleep(WAITS[n])
  raise AssertionError("the last try returns or raises")


def read_bytes(path: str, way_out: str) -> bytes:
  """All of a file. FileNotFoundError without it; Damaged, with the way out, for what is no such file."""

  def read() -> bytes:
    facts = storage.facts(path)
    if not facts.is_file:
      raise Damaged(f"{path} is {'a folder' if facts.is_folder else 'no file'}; {way_out}")
    if facts.size > MOST_BYTES:
      raise Damaged(f"{path} has {facts.size:,} bytes, more than any such file; {way_out}")
    return storage.read(path)

  try:
    return patiently(read, path)
  except NotADirectoryError as e:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from e
  except FileNotFoundError:
    raise
  except OSError as e:
    raise Damaged(f"{path} cannot be read ({reason(e)}); {way_out}") from None


def read_text(path: str, way_out: str) -> str:
  """`read_bytes` as UTF-8."""
  try:
    return read_bytes(path, way_out).decode()
  except UnicodeDecodeError as e:
    raise Damaged(f"{path} is not UTF-8 ({reason(e)}); {way_out}") from None


def read_json(path: str, way_out: str) -> dict[str, Any]:
  """The JSON object in a file."""
  try:
    content = json.loads(read_text(path, way_out))
  except RecursionError:
    raise Damaged(f"{path} is nested too deeply; {way_out}") from None
  except UserError:
    raise
  except ValueError as e:
    raise Damaged(f"{path} is not JSON ({reason(e)}); {way_out}") from None
  if not isinstance(content, dict):
    raise Damaged(f"{path} holds {type(content).__name__}, not a JSON object; {way_out}")
  return content


def set_aside(path: str) -> str:
  """Renames a file or folder to damaged-NAME next to it, numbered if that is taken; returns the new name."""
  folder, name = os.path.split(path)
  n, aside = 1, ASIDE + name
  try:
    taken = storage.names(folder or ".")
    while aside in taken:
      n += 1
      aside = f"{ASIDE}{name}.{n}"
    storage.rename(path, os.path.join(folder, aside))
  except OSError as e:
    raise UserError(f"{path} is damaged and cannot be renamed to {aside} ({e.strerror}); mend the "
                    "permissions of its folder, or copy the run to another place") from None
  return aside
