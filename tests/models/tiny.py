"""A config and a batch small enough that a test is mostly compilation."""

import functools

import jax
import numpy as np

from sparse_experts.config import default_config

VOCAB = 32

# Compiling is most of what these tests do; the lowest level halves it, and dropout's draws take a tenth.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny(name="decoder", **model):
  """Four layers of width 16, layers 1 and 3 sparse with 4 experts, dropless, untied head."""
  c = default_config()
  c.model.update(dict(
      name=name, num_layers=4, embed_dim=16, mlp_dim=24, num_heads=2, head_dim=8, tied_head=False,
      num_experts=4, group_size=16, capacity_factor=0.0, expert_init_scale=1.0))
  for key, value in model.items():
    if isinstance(value, dict):
      c.model[key].update(value)
    else:
      c.model[key] = value
  return c


def init(part):
  """(params, buffers) of a model or a stack; op by op, as compiling the draws takes five times as long."""
  return part.init(jax.random.key(0))


def make_batch(rows=2, length=16, encoder_length=12, seed=0):
  """Two segments a row and padding at the end; ids from 3 up, so that 2 can stand for poison."""
  rng = np.random.default_rng(seed)

  def packed(n):
    segments, positions = np.zeros((rows, n), np.int32), np.zeros((rows, n), np.int32)
    for row in range(rows):
      first, last = n // 2 - row % 3, n - 2
      segments[row, :first], segments[row, first:last] = 1, 2
      positions[row, :first], positions[row, first:last] = np.arange(first), np.arange(last - first)
    return rng.integers(3, VOCAB, (rows, n), dtype=np.int32), segments, positions

  decoder = dict(zip(("decoder_inputs", "segments", "positions"), packed(length)))
  encoder = dict(zip(("encoder_inputs", "encoder_segments", "encoder_positions"), packed(encoder_length)))
  return {**decoder, **encoder, "domain": np.arange(rows, dtype=np.int32)}


def one_segment(batch):
  """The same ids, each row a single sequence without padding."""
  batch = dict(batch)
  for segments, positions in (("segments", "positions"), ("encoder_segments", "encoder_positions")):
    shape = batch[segments].shape
    batch[segments] = np.ones(shape, np.int32)
    batch[positions] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  return batch
