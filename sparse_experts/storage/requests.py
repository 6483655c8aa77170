"""Requests to a store, through fsspec, and what is made of a store that cannot answer now.

What a store cannot take now (429, 503, no answer, an answer or an upload cut off) is repeated for PATIENCE
seconds. What lasts longer is an OSError like those of a disk: FileNotFoundError, PermissionError for what the
credentials may not do, or EIO.
"""

import errno
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sparse_experts.errors import UserError
from sparse_experts.storage.address import split

T = TypeVar("T")

PATIENCE = 90.0  # seconds: a store that is out of order for a minute is waited for
SILENCE = 20.0  # seconds without a byte of an answer after which a request is given up
NO_RIGHTS, NO_ANSWER = errno.EACCES, errno.EIO
_NUMBERS = {FileExistsError: errno.EEXIST, NotADirectoryError: errno.ENOTDIR, IsADirectoryError: errno.EISDIR}


@functools.cache
def store_of(scheme: str) -> Any:
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


def ask(address: str, request: Callable[[Any, str], T], patience: float | None = None) -> T:
  """request(file system, path in it), repeated while the store cannot take it."""
  scheme, bucket, key = split(address)
  store = store_of(scheme)
  path = store._strip_protocol(f"{scheme}://{bucket}/{key}".rstrip("/"))  # as all of fsspec call it
  told = False
  until, wait = time.monotonic() + (PATIENCE if patience is None else patience), 0.2
  while True:
    try:
      return request(store, path)
    except (TypeError, AttributeError, NameError, LookupError, AssertionError):
      raise  # a fault of ours
    except Exception as e:  # of aiohttp, requests, google.auth, gcsfs and others
      error = _as_os_error(e, address)
      if error.errno != NO_ANSWER or time.monotonic() + wait > until:
        raise error from None
      if not told:
        left = until - time.monotonic()
        logging.warning("%s: %s; it is asked again for %.0f seconds", address, error.strerror, left)
        told = True
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
  if isinstance(e, ValueError) or (str(code).startswith("4") and str(code) not in ("408", "429")):
    return OSError(errno.EINVAL, f"the store refuses it: {text[:120]}", address)
  return OSError(NO_ANSWER, f"the store does not answer: {text[:120]}", address)
