"""What is an address such as gs://bucket/run, and what is a path of this machine."""

import dataclasses
import re

from sparse_experts.errors import UserError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"(gs|s3|az|hf):/[^/]")
KEEPS_RUNS = "gs"  # of what tensorstore writes arrays to, and leases can be held in


@dataclasses.dataclass(frozen=True)
class Facts:
  """What has a name; of neither kind is a pipe or a device."""

  size: int
  is_file: bool
  is_folder: bool


def is_address(path: str) -> bool:
  """Whether it is SCHEME://...; ./gs://... is a path."""
  return _ADDRESS.match(path) is not None


def split(address: str) -> tuple[str, str, str]:
  """(scheme, bucket or host, key) without slashes that say nothing: gs://b//run/ is gs://b/run."""
  found = _ADDRESS.fullmatch(address)
  assert found, address
  bucket, *key = [part for part in found[2].split("/") if part] or [""]
  return found[1].lower(), bucket, "/".join(key)


def check(path: str, what: str) -> None:
  """Refuses an address that cannot be one, and a path that was meant to be one.

  what: what messages call it, such as --workdir=gs:/bucket.
  """
  if not is_address(path):
    if _ONE_SLASH.match(path):
      scheme, _, rest = path.partition(":/")
      raise UserError(f"{what} looks like an address with a slash too few; write {scheme}://{rest}, or "
                      f"./{path} for a folder here")
    return
  scheme, bucket, _ = split(path)
  if scheme in ("file", "local"):
    raise UserError(f"{what} is of this machine; write the path alone, without {scheme}://")
  if not bucket:
    raise UserError(f"{what} names no bucket; write {scheme}://BUCKET/NAME")
  if scheme == "gs" and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
    raise UserError(f"{what}: no bucket is called {bucket!r}; names have small letters, digits, - _ and .")


def check_keeps_runs(path: str, what: str) -> None:
  """`check`, and refuses an address where no run can be kept."""
  check(path, what)
  if is_address(path) and split(path)[0] != KEEPS_RUNS:
    raise UserError(f"{what}: runs are kept in folders and at gs:// addresses; give one of these, or mount "
                    "the store and name the folder (docs/tpu.md)")
