"""Every file of a folder, an address or a .zip, unpacked, in a fixed order; no more than memory can hold."""

import gzip
import io
import itertools
import lzma
import os
import pathlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

from sparse_experts import host_memory, storage
from sparse_experts.errors import UserError

# What an archive may unpack to: text shrinks to a third or a tenth; what grows a thousandfold was made so.
MOST_TIMES, ALWAYS_ALLOWED = 100, 64 * 2**20


def members(path: str, wanted: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], bytes, str]]:
  """(path parts, parts inside a .zip, content, name for messages) of every file, sorted; not of hidden ones.

  wanted: what the user is asked for if there is nothing at `path`. Raises UserError for more than the
  machine's memory can hold, and for what an archive has no reason to do: names that leave it, links, a name
  twice, contents of a hundred times its size.
  """
  storage.check(path, f"data.source='files:{path}'")
  if not storage.is_address(path):
    yield from _members(pathlib.Path(os.path.expanduser(path)), path, wanted)
    return
  here = path
  try:
    with storage.cached(path) as here:
      for *parts, name in _members(pathlib.Path(here), path, wanted):
        yield *parts, name.replace(here, path)  # type: ignore[misc]
  except UserError as e:
    raise UserError(str(e).replace(here, path)) from None
  except FileNotFoundError:
    raise UserError(f"data.source='files:{path}' does not exist; give {wanted}") from None
  except OSError as e:
    raise UserError(f"data.source='files:{path}' cannot be read: {e.strerror}; mend that, or copy the files "
                    "here") from None


def _members(root: pathlib.Path, path: str, wanted: str,
             ) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], bytes, str]]:
  """`members` of this machine; the user called them `path`."""
  if not root.exists():
    raise UserError(f"data.source='files:{path}' does not exist; give {wanted}")
  room = _Room(host_memory.limit())
  if root.is_file():
    yield from _file(root, (), f"files:{path}", room)
    return
  for parts in _walk(root, (), {}):
    file = root.joinpath(*parts)
    yield from _file(file, parts, f"files:{file}", room)


def _walk(root: pathlib.Path, parts: tuple[str, ...], above: dict[tuple[int, int], str],
          ) -> Iterator[tuple[str, ...]]:
  """Parts of the paths of all files below `parts`, sorted; links to folders are followed.

  above: the folders on the way here, by what they are on disk: a link back to one of them would never end.
  """
  folder = root.joinpath(*parts)
  try:
    is_what = (of := folder.stat()).st_dev, of.st_ino
    names = sorted(os.listdir(folder))
  except OSError as e:
    raise UserError(f"data.source='files:{folder}' cannot be read: {e.strerror}; mend, remove or replace it"
                    ) from None
  if is_what in above:
    raise UserError(f"data.source='files:{folder}' is a link back to {above[is_what]}, which never ends; "
                    "remove the link")
  for name in names:
    inner = root.joinpath(*parts, name)
    if name.startswith("."):
      continue
    if inner.is_dir():
      yield from _walk(root, (*parts, name), above | {is_what: str(folder)})
    elif inner.is_file():
      yield *parts, name


class _Room:
  """Bytes of memory that are left for what is read."""

  def __init__(self, size: int):
    self._size = self._left = size

  def take(self, size: int, name: str) -> None:
    self._left -= size
    if self._left < 0:
      needed, there = map(host_memory.words, (self._size - self._left, self._size))
      raise UserError(f"data.source='{name}' and what was read before it need {needed} of memory, but this "
                      f"process may have {there}; give it fewer files, or write package.module:function")


def _file(file: pathlib.Path, parts: tuple[str, ...], name: str, room: _Room):
  try:
    size = file.stat().st_size
    room.take(size, name)
    data = file.read_bytes()
    most = max(MOST_TIMES * size, ALWAYS_ALLOWED)
    if file.suffix == ".gz":
      with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        data = _unpack(stream, most, name)
      room.take(len(data), name)
    if file.suffix != ".zip":
      yield parts, () if parts else (file.name,), data, name
      return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      chosen = [(info, inner) for info in sorted(archive.infolist(), key=lambda info: info.filename)
                if (inner := _inside(info, name)) is not None]
      _check_names([info.filename for info, _ in chosen], name)
      total = sum(info.file_size for info, _ in chosen)
      if total > most:
        raise _bomb(name, size, total)
      room.take(total, name)
      for info, inner in chosen:
        with archive.open(info) as stream:
          yield parts, inner, _unpack(stream, info.file_size, name), f"{name}/{info.filename}"
  except UserError:
    raise
  # RuntimeError: encrypted; ValueError: names that are no text, places before the file's begin
  except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, ValueError,
          struct.error) as e:
    reason = getattr(e, "strerror", None) or str(e)
    raise UserError(f"data.source='{name}' cannot be read: {reason}; mend, remove or replace it") from e


def _inside(info: zipfile.ZipInfo, name: str) -> tuple[str, ...] | None:
  """The path parts of a member of a .zip; None for folders and hidden files."""
  path = info.filename.replace("\\", "/")
  inner = pathlib.PurePosixPath(path).parts
  why = ("leaves the archive" if ".." in inner or path.startswith("/") or path[1:2] == ":" else
         "is a link" if stat.S_ISLNK(info.external_attr >> 16) else "")
  if why:
    raise UserError(f"data.source='{name}': its member {info.filename!r} {why}; unpack it where that is "
                    "safe, look at it, and name the folder")
  if info.is_dir() or any(part.startswith((".", "__MACOSX")) for part in inner):
    return None
  return pathlib.PurePosixPath(info.filename).parts


def _check_names(names: list[str], archive: str) -> None:
  for one, other in itertools.pairwise(names):
    if one == other:
      raise UserError(f"data.source='{archive}' holds {one!r} twice; pack it anew")


def _unpack(stream: IO[bytes] | gzip.GzipFile, most: int, name: str) -> bytes:
  """All of the stream. Raises UserError if that is more than `most` bytes, after no more than those."""
  data = stream.read(most + 1)
  if len(data) > most:
    raise _bomb(name, None, most)
  return data


def _bomb(name: str, packed: int | None, unpacked: int) -> UserError:
  of = "" if packed is None else f" from {host_memory.words(packed)}"
  more = "more than " if packed is None else ""
  return UserError(f"data.source='{name}' unpacks to {more}{host_memory.words(unpacked)}{of}, over "
                   f"{MOST_TIMES} times its size; if it is meant so, unpack it yourself and name the folder")
