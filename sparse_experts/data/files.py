"""Every file of a folder or a .zip, unpacked, in a fixed order."""

import gzip
import io
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator

from sparse_experts.errors import UserError


def members(path: str, wanted: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], bytes, str]]:
  """(path parts, parts inside a .zip, content, name for messages) of every file, sorted; not of hidden ones.

  wanted: what the user is asked for if there is nothing at `path`.
  """
  root = pathlib.Path(os.path.expanduser(path))
  if not root.exists():
    raise UserError(f"data.source='files:{path}' does not exist; give {wanted}")
  if root.is_file():
    yield from _file(root, (), f"files:{path}")
    return
  for file in sorted(root.rglob("*")):
    parts = file.relative_to(root).parts
    if file.is_file() and not any(p.startswith(".") for p in parts):
      yield from _file(file, parts, f"files:{file}")


def _file(file: pathlib.Path, parts: tuple[str, ...], name: str):
  try:
    data = file.read_bytes()
    if file.suffix == ".gz":
      data = gzip.decompress(data)
    if file.suffix != ".zip":
      yield parts, () if parts else (file.name,), data, name
      return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      for member in sorted(archive.namelist()):
        inner = pathlib.PurePosixPath(member).parts
        if not member.endswith("/") and not any(p.startswith((".", "__MACOSX")) for p in inner):
          yield parts, inner, archive.read(member), f"{name}/{member}"
  except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as e:  # RuntimeError: encrypted
    reason = getattr(e, "strerror", None) or str(e)
    raise UserError(f"data.source='{name}' cannot be read: {reason}; mend, remove or replace it") from e
