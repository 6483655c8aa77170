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
  for parts in _walk(root, (), {}):
    file = root.joinpath(*parts)
    yield from _file(file, parts, f"files:{file}")


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
