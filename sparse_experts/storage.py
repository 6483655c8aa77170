"""Writes a file whole: after a kill its name holds what it held before or all of the new, never a part."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO


def temporary(path: str) -> str:
  """Where a file is written before it gets its name."""
  return path + ".tmp"


@contextlib.contextmanager
def create(path: str) -> Iterator[BinaryIO]:
  """A file to write to, which is `path` once the block ends without an error."""
  with open(temporary(path), "wb") as f:
    yield f
  os.replace(temporary(path), path)


def write(path: str, content: bytes | str) -> None:
  with create(path) as f:
    f.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str, content: Any) -> None:
  write(path, json.dumps(content, indent=2) + "\n")
