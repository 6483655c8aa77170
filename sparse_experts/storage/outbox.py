"""Folders that libraries write to by themselves, which know files only."""

import os
import tempfile

from sparse_experts.storage import local, objects
from sparse_experts.storage.address import is_address


class Outbox:
  """`folder` is where to write; that folder itself, or for an address one whose files are sent by `ship`."""

  def __init__(self, target: str):
    self._target, self._temporary = target, None
    if is_address(target):
      self._temporary = tempfile.TemporaryDirectory(prefix="sparse_experts-")
    self.folder = self._temporary.name if self._temporary else target
    if not self._temporary:
      local.make_folders(target)

  def ship(self) -> int:
    """Stores the files as they are; returns how many bytes: none of a folder's own."""
    if self._temporary is None:
      return 0
    objects.put_folder(self.folder, self._target)
    return sum(os.path.getsize(os.path.join(inside, name))
               for inside, _, files in os.walk(self.folder) for name in files)

  def empty(self) -> None:
    """Removes what was shipped from this machine."""
    assert self._temporary
    self._temporary.cleanup()
    os.makedirs(self.folder)

  def close(self) -> None:
    """Ships, and removes what is of this machine."""
    try:
      self.ship()
    finally:
      if self._temporary:
        self._temporary.cleanup()
