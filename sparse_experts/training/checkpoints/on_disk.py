"""When a checkpoint counts as one: on a disk by its name, in a store by a marker that is written last."""

import asyncio

from orbax.checkpoint.path import atomicity

from sparse_experts import storage


class OnDisk(atomicity.AtomicRenameTemporaryPath):
  """orbax's folder of a save under way, flushed before it gets the name of its step.

  orbax renames without a flush, after its own last files. So it is made to rename to a name that does not
  count yet; the step's follows when all files are on the disk. Older steps go after that.
  """

  async def finalize(self) -> None:
    final = self.get_final()
    if atomicity.TMP_DIR_SUFFIX in final.parent.name:  # a part of a step, which is flushed with it
      return await super().finalize()
    name = f"{final.name}.flushing{atomicity.TMP_DIR_SUFFIX}"  # by its end one that is removed if left over
    self._final_path = final.parent / name
    try:
      await super().finalize()
      await asyncio.to_thread(storage.flush_tree, str(self._final_path))
      await asyncio.to_thread(storage.move, str(self._final_path), str(final))
    finally:
      self._final_path = final


def committing(folder: str) -> type[atomicity.TemporaryPathBase]:
  """How orbax saves in a folder or at an address, where its marker is `storage.is_complete`'s."""
  return atomicity.CommitFileTemporaryPath if storage.is_address(folder) else OnDisk
