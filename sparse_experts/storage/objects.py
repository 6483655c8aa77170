"""Objects of a store by their addresses, through fsspec; conditions on generations where it is gs://.

An object is written whole by one request and appears whole. A request that a store cannot take now (429, 503,
no answer, an answer or an upload cut off) is repeated for PATIENCE seconds. What lasts longer is an OSError
like those of a disk: FileNotFoundError, PermissionError for what the credentials may not do, or EIO.
"""

import base64
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import hashlib
import io
import os
import posixpath
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

from sparse_experts.errors import UserError
from sparse_experts.storage.address import KEEPS_RUNS, Facts, split

T = TypeVar("T")

PATIENCE = 90.0  # seconds: a store that is out of order for a minute is waited for
SILENCE = 20.0  # seconds without a byte of an answer after which a request is given up
LARGE = 2**26  # bytes, that are not sent in one request
LAST = "commit_success.txt"  # orbax's marker of a folder that is complete
_AT_ONCE = 16  # requests
NO_RIGHTS, NO_ANSWER = errno.EACCES, errno.EIO
_NUMBERS = {FileExistsError: errno.EEXIST, NotADirectoryError: errno.ENOTDIR, IsADirectoryError: errno.EISDIR}


@functools.cache
def _store(scheme: str) -> Any:
  """The fsspec file system of a scheme; epath, and so orbax, gets its own with the same settings."""
  extra = "; pip install 'sparse_experts[gcs]'" if scheme == "gs" else ""
  try:
    import fsspec
  except ImportError as e:
    raise UserError(f"{scheme}:// addresses need a package that is not installed, {e.name}{extra}") from None
  try:
    if scheme == "gs":
      import aiohttp

      # tensorstore, which reads and writes arrays, has no limit by itself.
      os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", f"{SILENCE:.0f}")
      os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{SILENCE:.0f}")
      os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")  # a second

      fsspec.config.conf["gcs"] = {
          "use_listings_cache": False,  # tensorstore writes past it
          "consistency": "md5",  # of what was sent and what was stored
          "requests_timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE),
      } | fsspec.config.conf.get("gcs", {})
    return fsspec.filesystem(scheme)
  except ImportError as e:
    which = f", {e.name}" if e.name else f": {e}"
    raise UserError(f"{scheme}:// addresses need a package that is not installed{which}{extra}") from None
  except ValueError:
    raise UserError(f"{scheme}:// is no kind of address that fsspec knows; write gs://BUCKET/NAME") from None


def _ask(address: str, request: Callable[[Any, str], T], patience: float | None = None) -> T:
  """request(file system, path in it), repeated while the store cannot take it."""
  scheme, bucket, key = split(address)
  store, path = _store(scheme), f"{bucket}/{key}" if key else bucket
  until, wait = time.monotonic() + (PATIENCE if patience is None else patience), 0.2
  while True:
    try:
      return request(store, path)
    except Exception as e:  # of aiohttp, requests, google.auth, gcsfs and others
      error = _as_os_error(e, address)
      if error.errno != NO_ANSWER or time.monotonic() + wait > until:
        raise error from None
    time.sleep(wait)
    wait = min(2 * wait, 8.0)


def _as_os_error(e: Exception, address: str) -> OSError:
  code, text = getattr(e, "code", None), " ".join(str(e).split()) or type(e).__name__
  if isinstance(e, FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError):
    number = e.errno or _NUMBERS.get(type(e), errno.ENOENT)
    return type(e)(number, os.strerror(number), address)
  if isinstance(e, PermissionError) or text.startswith("Forbidden") or str(code) == "403":
    return PermissionError(NO_RIGHTS, f"no rights there: {text[:120]}", address)
  if str(code) == "401" or type(e).__module__.startswith("google.auth"):
    return PermissionError(NO_RIGHTS, f"the credentials do not hold: {text[:120]}", address)
  return OSError(NO_ANSWER, f"the store does not answer: {text[:120]}", address)


# The verbs, as those of `local`


def read(path: str) -> bytes:
  return _ask(path, lambda store, at: store.cat_file(at))


def open_file(path: str) -> BinaryIO:
  return io.BytesIO(read(path))


def put(path: str, content: bytes) -> None:
  if split(path)[0] == KEEPS_RUNS:
    _ask(path, lambda store, _: _upload(store, path, content))
  else:
    _ask(path, lambda store, at: store.pipe_file(at, content))


def _upload(store: Any, path: str, content: bytes, **conditions: str) -> str:
  """Stores the bytes as they are in one request; returns the generation. OSError if others were stored."""
  _, bucket, key = split(path)
  url = f"{store.base.replace('/storage/v1/', '/upload/storage/v1/')}b/{bucket}/o"
  stored = store.call("POST", url, uploadType="media", name=key, data=content, json_out=True,
                      headers={"Content-Type": "application/octet-stream"}, **conditions)
  if stored.get("md5Hash", of := base64.b64encode(hashlib.md5(content).digest()).decode()) != of:
    raise OSError(NO_ANSWER, "other bytes were stored than were sent")
  return stored["generation"]


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
    _ask(path, lambda store, at: store.put_file(place, at))  # in several requests


def facts(path: str) -> Facts:
  info = _ask(path, lambda store, at: store.info(at))
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
  found = _ask(folder, lambda store, at: (store.ls(at, detail=False), at))
  if found[0] == [found[1]]:
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
  return sorted({name for path in found[0] if (name := path.rstrip("/").rpartition("/")[2])})


def tree(folder: str) -> dict[str, dict[str, Any]]:
  """{path below the folder: facts of fsspec} of all objects, sorted; of an object {"": its facts}."""
  def ask(store: Any, at: str) -> dict[str, Any]:
    return {path.removeprefix(at).strip("/"): info for path, info in store.find(at, detail=True).items()}

  return dict(sorted(_ask(folder, ask).items()))


def remove(path: str) -> None:
  _ask(path, lambda store, at: store.rm_file(at))


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
    _, bucket, key = split(below(target, name))
    _ask(below(path, name), lambda store, at: store.cp_file(at, f"{bucket}/{key}"))

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
  _ask(path, lambda store, at: store.get_file(at, place))


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


# Conditions: of several writers at once one succeeds


def look(path: str, patience: float | None = None) -> tuple[bytes, str, datetime.datetime] | None:
  """(content, generation, when it was written by the store's clock); None if there is none."""
  _, bucket, key = split(path)

  def ask(store: Any, _: str) -> tuple[bytes, str, datetime.datetime]:
    while True:
      info = store.call("GET", "b/{}/o/{}", bucket, key, json_out=True)
      with contextlib.suppress(FileNotFoundError):  # of that generation: it was written in between
        _, content = store.call("GET", "b/{}/o/{}", bucket, key, alt="media", generation=info["generation"])
        return content, info["generation"], datetime.datetime.fromisoformat(info["updated"])

  try:
    return _ask(path, ask, patience)
  except FileNotFoundError:
    return None


def put_if(path: str, content: bytes, generation: str, patience: float | None = None) -> str | None:
  """Writes in place of that generation ("0": of nothing); returns the new one, None if it is no longer there.

  None too where it was written and the answer was lost: `look` tells.
  """
  ask = lambda store, _: _upload(store, path, content, ifGenerationMatch=generation)
  try:
    return _ask(path, ask, patience)
  except FileExistsError:
    return None


def remove_if(path: str, generation: str) -> None:
  """Removes that generation, unless it is gone."""
  _, bucket, key = split(path)
  with contextlib.suppress(FileNotFoundError, FileExistsError):
    _ask(path, lambda store, _: store.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation))
