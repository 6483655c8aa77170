"""One training per work directory: a second one, on any host, is refused before it reads or writes there."""

import contextlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparse_experts import storage
from sparse_experts.errors import UserError
from sparse_experts.training.log import say

_LONGEST = 1000  # bytes of a refusal that other processes are told


def hold(workdir: str, stack: contextlib.ExitStack) -> storage.Lease | None:
  """Holds the folder until `stack` is left; of several processes, the first does so for all: None elsewhere.

  Raises UserError, in every process, if another training has it.
  """
  held, refused = None, b""
  if jax.process_index() == 0:
    try:
      held = stack.enter_context(storage.lease(workdir, f"workdir {workdir}", say))
    except UserError as e:
      refused = str(e).encode()[:_LONGEST]
  if jax.process_count() > 1:
    mine = np.frombuffer(refused.ljust(_LONGEST), np.uint8)
    refused = multihost_utils.broadcast_one_to_all(mine).astype(np.uint8).tobytes().strip()
  if refused:
    raise UserError(refused.decode(errors="replace"))
  return held
