r"""Another name for a folder whose path the libraries below would not read as it stands.

orbax looks for its files with a glob over the whole path, unescaped; tensorstore's file driver turns `\` into
`/`; etils takes `/gs/...` for a bucket. A checkpoint in `run[lr=0.1]` would be written and never found.
"""

import os
import re
import shutil
import tempfile
import weakref

from sparse_experts.errors import UserError

_PLAIN = re.compile(r"[\w /.,=+@~:#-]*", re.ASCII)
_BUCKETS = ("/gs/", "/s3/", "/az/", "/hf/")


class PlainPath:
  """`path` leads to `folder`: the folder's own path, or that of a link among the temporary files.

  The link goes when this object does. Raises UserError where none can be made.
  """

  def __init__(self, folder: str):
    self._folder = self.path = os.path.abspath(folder)
    if _PLAIN.fullmatch(self._folder) and not self._folder.startswith(_BUCKETS):
      return
    way_out = "name the workdir with letters, digits and the characters _ . , = + - @ alone"
    try:
      links = tempfile.mkdtemp(prefix="sparse_experts-")
      weakref.finalize(self, shutil.rmtree, links, ignore_errors=True)  # at the exit of the process, too
      self.path = os.path.join(links, "folder")
      os.symlink(self._folder, self.path, target_is_directory=True)
    except OSError as e:
      raise UserError(f"{self._folder!r} needs a link among the temporary files, which cannot be made "
                      f"({e.strerror}); {way_out}") from None
    if not _PLAIN.fullmatch(self.path):
      raise UserError(f"{self._folder!r} and the folder of temporary files, {tempfile.gettempdir()!r}, both "
                      f"have characters that orbax cannot read; {way_out}, or set TMPDIR")

  def shown(self, message: str) -> str:
    """A library's message, with the folder's own path in it."""
    return message.replace(self.path, self._folder)
