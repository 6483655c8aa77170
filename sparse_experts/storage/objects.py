"""Objects of a store by their addresses: the verbs of `local`, where nothing is renamed and nothing grows.

An object is written whole and appears whole.
"""

import concurrent.futures
import contextlib
import errno
import io
import os
import posixpath
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from sparse_experts.errors import UserError
from sparse_experts.storage.address import KEEPS_RUNS, Facts, split
from sparse_experts.storage.generations import upload
from sparse_experts.storage.requests import ask

LARGE = 2**26  # bytes, that are not sent in one request
LAST = "commit_success.txt"  # orbax's marker of a folder that is complete
_AT_ONCE = 16  # requests


def read(path: str) -> bytes:
  return ask(path, lambda store, at: store.cat_file(at))


def open_file(path: str) -> BinaryIO:
  return io.BytesIO(read(path))


def put(path: str, content: bytes) -> None:
  if split(path)[0] == KEEPS_RUNS:
    ask(path, lambda store, _: upload(store, path, content))
  else:
    ask(path, lambda store, at: store.pipe_file(at, content))


@contextlib.contextmanager
def create(path: str) -> Iterator[BinaryIO]:
  """A file to write to, which is stored as an object once the block ends; after an error nothing is."""
  with tempfile.TemporaryDirectory(prefix="sparse_experts-") as folder:
    with open(place := os.path.join(folder, "file"), "wb") as f:
      yield f
    put_file(place, path)


def put_file(place: str, path: str) -> None:
  """Stores a file of this machine."""
  if os.path.getsize(place) < LARGE:
    with open(place, "rb") as f:
      put(path, f.read())
  else:
    ask(path, lambda store, at: store.put_file(place, at))  # in several requests


def facts(path: str) -> Facts:
  info = ask(path, lambda store, at: store.info(at))
  return Facts(info.get("size") or 0, info["type"] == "file", info["type"] == "directory")


def exists(path: str) -> bool:
  try:
    facts(path)
  except FileNotFoundError:
    return False
  return True


def is_folder(path: str) -> bool:
  try:
    return facts(path).is_folder
  except FileNotFoundError:
    return False


def is_complete(folder: str) -> bool:
  return exists(f"{folder}/{LAST}")


def names(folder: str) -> list[str]:
  """Of what is in it; FileNotFoundError where nothing is."""
  found = ask(folder, lambda store, at: (store.ls(at, detail=False), at))
  if found[0] == [found[1]]:
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
  return sorted({name for path in found[0] if (name := path.rstrip("/").rpartition("/")[2])})


def tree(folder: str) -> dict[str, dict[str, Any]]:
  """{path below the folder: facts of fsspec} of all objects, sorted; of an object {"": its facts}."""
  def find(store: Any, at: str) -> dict[str, Any]:
    return {path.removeprefix(at).strip("/"): info for path, info in store.find(at, detail=True).items()}

  return dict(sorted(ask(folder, find).items()))


def remove(path: str) -> None:
  ask(path, lambda store, at: store.rm_file(at))


def remove_folder(folder: str) -> None:
  """What says that the folder is complete goes first: one that is cut short is incomplete."""
  found = list(tree(folder))
  markers = [name for name in found if name == LAST]
  _each(markers, lambda name: _remove_if_there(f"{folder}/{name}"))
  _each([name for name in found if name not in markers], lambda name: _remove_if_there(f"{folder}/{name}"))


def _remove_if_there(path: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    remove(path.rstrip("/"))


def rename(path: str, target: str) -> None:
  """Copies within the store, then removes; cut short, the old name is there and whole, or incomplete."""
  below = lambda folder, name: f"{folder}/{name}" if name else folder

  def copy(name: str) -> None:
    to = absolute(below(target, name))
    ask(below(path, name), lambda store, at: store.cp_file(at, store._strip_protocol(to)))

  found = list(tree(path))
  if not found:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
  _each([name for name in found if name != LAST], copy)
  _each([name for name in found if name == LAST], copy)
  remove_folder(path)


def put_folder(folder: str, address: str) -> None:
  """Stores a folder of this machine; files named `LAST` after all others."""
  found = [os.path.relpath(os.path.join(inside, name), folder)
           for inside, _, files in os.walk(folder) for name in files]

  def store(name: str) -> None:
    put_file(os.path.join(folder, name), f"{address}/{name}")

  last = [name for name in found if os.path.basename(name) == LAST]
  _each([name for name in found if name not in last], store)
  _each(last, store)


def deliver(path: str, target: str) -> None:
  """Stores a file, or a folder of checkpoints, which then count."""
  if os.path.isfile(path):
    put_file(path, target)
    return
  for name in os.listdir(path):
    with open(os.path.join(path, name, LAST), "wb"):
      pass
  put_folder(path, target)


def fetch(path: str, place: str) -> None:
  """Copies an object to a file of this machine."""
  ask(path, lambda store, at: store.get_file(at, place))


@contextlib.contextmanager
def fetched(folder: str) -> Iterator[str]:
  """A folder of this machine with the same files, within the block."""
  with tempfile.TemporaryDirectory(prefix="sparse_experts-") as here:
    def get(name: str) -> None:
      place = os.path.join(here, *name.split("/"))
      os.makedirs(os.path.dirname(place), exist_ok=True)
      fetch(f"{folder}/{name}", place)

    found = [name for name in tree(folder) if name and ".." not in name.split("/")]
    if not found:
      raise UserError(f"{folder} holds nothing; mend its name")
    _each(found, get)
    yield here


def _each(items: Sequence[str], do: Callable[[str], None]) -> None:
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    for done in [pool.submit(do, item) for item in items]:
      done.result()


def make_folders(folder: str) -> None:
  """Folders are no objects: they are there with what is in them."""


def prepare(folder: str, what: str) -> None:
  """Raises UserError where objects cannot be written: in a bucket that is not there, or without rights."""
  try:
    with contextlib.suppress(FileNotFoundError):
      if facts(folder).is_file:
        raise UserError(f"{what} is an object; name a folder")
    probe = f"{folder}/.{uuid.uuid4().hex}.tmp"
    put(probe, b"")  # says more than a look at the bucket, for which other rights are needed
    _remove_if_there(probe)
  except FileNotFoundError:
    raise UserError(f"{what}: there is no bucket '{split(folder)[1]}'; make it, or mend its name") from None
  except PermissionError as e:
    raise UserError(f"{what} cannot be written ({e.strerror}); give this account the right to read and write "
                    "objects there, or `gcloud auth application-default login`") from None
  except OSError as e:
    raise UserError(f"{what} cannot be written ({e.strerror}); try again when it does") from None


def check_out(path: str, flag: str) -> None:
  """Raises UserError where an object cannot be written; flag: what messages call it."""
  prepare(os.path.dirname(path), flag)


def absolute(path: str) -> str:
  """The same address however it is spelt."""
  scheme, bucket, key = split(path)
  return f"{scheme}://{bucket}/{key}".rstrip("/")


real = absolute


def join(folder: str, path: str) -> str:
  scheme, bucket, key = split(folder)
  return absolute(f"{scheme}://{bucket}{posixpath.normpath(posixpath.join('/', key, path))}")


def relative(path: str, start: str) -> str:
  if split(path)[:2] != split(start)[:2]:
    return absolute(path)
  return posixpath.relpath("/" + split(path)[2], "/" + split(start)[2])


def kvstore(path: str) -> dict[str, Any]:
  """What tensorstore calls the place."""
  scheme, bucket, key = split(path)
  assert scheme == KEEPS_RUNS
  return {"driver": "gcs", "bucket": bucket, "path": key + "/" * path.endswith("/")}
