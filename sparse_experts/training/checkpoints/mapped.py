"""Checkpoints of memory-mapped arrays, written and read in chunks: for models larger than memory."""

import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from sparse_experts import full_disk, storage
from sparse_experts.training.checkpoints.arrays import open_arrays
from sparse_experts.training.checkpoints.checksums import add_to_checksum
from sparse_experts.training.checkpoints.meta import seal
from sparse_experts.training.checkpoints.on_disk import OnDisk
from sparse_experts.training.checkpoints.plain import PlainPath
from sparse_experts.training.checkpoints.steps import Steps
from sparse_experts.training.state import TrainState

_CHUNK = 1 << 23  # bytes of an array that are encoded at once; a few chunks are under way


def save_mapped(folder: str, state: TrainState, arrays: dict[str, list], meta: dict[str, Any]) -> None:
  """Saves a state of memory-mapped numpy arrays without reading any of them whole.

  arrays: what `checksums` would return for the state.
  """
  handlers = type_handlers.create_type_handler_registry(
      (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)))
  # With OCDBT all that is written stays in memory until the end.
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=handlers)
  chunked = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=_CHUNK if x.nbytes > _CHUNK else None), state)
  storage.make_folders(folder)
  plain = PlainPath(folder)  # its link lives as long as the variable
  with ocp.CheckpointManager(
      plain.path, item_handlers={"state": handler, "meta": ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(
          enable_async_checkpointing=False, temporary_path_class=OnDisk)) as manager:
    manager.save(int(state.step), args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=chunked), meta=ocp.args.JsonSave(seal(meta, arrays))))


def restore_mapped(steps: Steps, parts: tuple[str, ...], step: int,
                   folder: str) -> dict[str, np.ndarray]:
  """The arrays of params, buffers, ... by name ("params/..."), copied to files of `folder` and mapped.

  Memory holds a chunk at a time: all of an array (a device's share) that `Checkpoints.save` wrote, less of
  one of `save_mapped`.
  """
  facts = {name: fact for name, fact in steps.meta(step)["arrays"].items() if name.split("/")[0] in parts}
  wanted = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype, _) in facts.items()}
  copies = lambda: {name: _copy(there, os.path.join(folder, str(i)))
                    for i, (name, there) in enumerate(open_arrays(steps.plain_path(step), wanted))}
  found = steps.read(step, copies)
  for name, mapped in found.items():
    if add_to_checksum(0, mapped, 0) != facts[name][2]:
      raise steps.damaged(step, f"{name} is not what was saved")
  return found


def _copy(there: tensorstore.TensorStore, file: str) -> np.ndarray:
  """The array in a file, mapped; chunk by chunk."""
  mapped = full_disk.mapped(file, there.dtype.numpy_dtype, there.shape)
  chunk = there.chunk_layout.read_chunk_template.shape
  for at in np.ndindex(*(-(-n // size) for n, size in zip(there.shape, chunk, strict=True))):
    part = tuple(slice(i * size, min((i + 1) * size, n))
                 for i, size, n in zip(at, chunk, there.shape, strict=True))
    mapped[part] = there[part].read().result()
  return mapped
