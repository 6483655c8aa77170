"""When a checkpoint counts as one: on a disk by its name, in a store by a marker that is written last."""

import asyncio
import json

from orbax.checkpoint.path import atomicity

from sparse_experts import storage

PARTS = ("state", "meta")  # of a step


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


def is_complete(folder: str) -> bool:
  """Whether a step was saved to its end; at an address also one that was saved in a folder and copied.

  orbax notes the time of the end in a step. Markers, of a step and of its parts, it makes in a store only.
  """
  if storage.is_complete(folder):
    return True
  if not storage.is_address(folder) or any(storage.is_complete(f"{folder}/{part}") for part in PARTS):
    return False
  try:
    return bool(json.loads(storage.read(f"{folder}/_CHECKPOINT_METADATA"))["commit_timestamp_nsecs"])
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return False
