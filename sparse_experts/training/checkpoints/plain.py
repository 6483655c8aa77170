r"""Another name for a folder whose path the libraries below would not read as it stands.

orbax looks for its files with a glob over the whole path, unescaped; tensorstore's file driver turns `\` into
`/`; etils takes `/gs/...` for a bucket. A checkpoint in `run[lr=0.1]` would be written and never found.
"""

import os
import re
import shutil
import tempfile
import weakref

from sparse_experts import storage
from sparse_experts.errors import UserError

_PLAIN = re.compile(r"[\w /.,=+@~:#-]*", re.ASCII)
_WAY_OUT = "name the workdir with letters, digits and the characters _ . , = + - @ alone"
_BUCKETS = ("/gs/", "/s3/", "/az/", "/hf/")


class PlainPath:
  """`path` leads to `folder`: the folder's own path, or that of a link among the temporary files.

  The link goes when this object does. Raises UserError where none can be made.
  """

  def __init__(self, folder: str):
    self._folder = self.path = storage.absolute(folder)
    if storage.is_address(folder):
      if not _PLAIN.fullmatch(folder):
        raise UserError(f"{folder!r} has characters that orbax cannot read; {_WAY_OUT}")
      return
    if _PLAIN.fullmatch(self._folder) and not self._folder.startswith(_BUCKETS):
      return
    try:
      links = tempfile.mkdtemp(prefix="sparse_experts-")
      weakref.finalize(self, shutil.rmtree, links, ignore_errors=True)  # at the exit of the process, too
      self.path = os.path.join(links, "folder")
      os.symlink(self._folder, self.path, target_is_directory=True)
    except OSError as e:
      raise UserError(f"{self._folder!r} needs a link among the temporary files, which cannot be made "
                      f"({e.strerror}); {_WAY_OUT}") from None
    if not _PLAIN.fullmatch(self.path):
      raise UserError(f"{self._folder!r} and the folder of temporary files, {tempfile.gettempdir()!r}, both "
                      f"have characters that orbax cannot read; {_WAY_OUT}, or set TMPDIR")

  def shown(self, message: str) -> str:
    """A library's message, with the folder's own path in it."""
    return message.replace(self.path, self._folder)
