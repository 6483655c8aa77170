"""Objects that are read again and again, kept on this machine's disk: what was read longest ago goes first.

A file is kept under a hash of its address and of what the store says changes with its content, so a changed
object is fetched anew.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from sparse_experts.errors import UserError
from sparse_experts.full_disk import naming
from sparse_experts.storage import local, objects
from sparse_experts.storage.address import is_address, split

VARIABLE, GIB = "SPARSE_EXPERTS_CACHE_GIB", 20.0  # of the user's, and its default
_CHANGES = ("generation", "etag", "ETag", "md5Hash", "mtime", "LastModified", "last_modified", "created")


@contextlib.contextmanager
def cached(path: str) -> Iterator[str]:
  """A path of this machine with the same file or files, within the block: of an address, from the cache.

  FileNotFoundError if nothing is there. Raises UserError for more than the cache may hold.
  """
  if not is_address(path):
    yield path
    return
  kept = local.user_cache("objects", os.environ)
  most = int(_gib(os.environ) * 2**30)
  found = {name: info for name, info in objects.tree(path).items() if ".." not in name.split("/")}
  if not found:
    raise FileNotFoundError(2, os.strerror(2), path)
  if (size := sum(info.get("size") or 0 for info in found.values())) > most:
    raise UserError(f"{path} holds {size / 2**30:.3g} GiB, and the cache of objects may hold "
                    f"{most / 2**30:.3g}; set {VARIABLE} to more, or copy the files to a folder")
  with naming(kept):
    os.makedirs(kept, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tree-", dir=kept, ignore_cleanup_errors=True) as above:
      root = os.path.join(above, split(path)[2].rpartition("/")[2] or split(path)[1])

      def fetch(name: str) -> None:
        place = os.path.join(root, *name.split("/")) if name else root
        os.makedirs(os.path.dirname(place), exist_ok=True)
        # A link, by which the content stays where another process removes it from the cache.
        os.link(_kept(kept, f"{path.rstrip('/')}/{name}".rstrip("/"), found[name]), place)

      with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(fetch, name) for name in found]:
          done.result()
      local.prune(kept, most)
      yield root


def _gib(environ: Mapping[str, str]) -> float:
  try:
    return float(environ.get(VARIABLE) or GIB)
  except ValueError:
    raise UserError(f"{VARIABLE}={environ[VARIABLE]} is no number of GiB; write for example {GIB:g}"
                    ) from None


def _kept(folder: str, address: str, info: Mapping[str, Any]) -> str:
  """The file in the cache with an object's content, fetched if it is not there."""
  changes = next((str(info[key]) for key in _CHANGES if info.get(key)), uuid.uuid4().hex)
  name = hashlib.sha256(f"{objects.absolute(address)} {changes} {info.get('size')}".encode()).hexdigest()
  place = os.path.join(folder, name)
  try:
    os.utime(place)  # read just now
  except FileNotFoundError:
    objects.fetch(address, fresh := f"{place}.{uuid.uuid4().hex}.tmp")
    local.move(fresh, place)
  return place
