"""Refuses, before anything is allocated, a model that this machine's memory cannot hold.

What is counted is needed at least: a run that passes may still need more. Only on CPUs: an accelerator says
itself, and at once, that its memory is full. `config.train.memory` says how much there is instead.
"""

import math
from typing import Any

import jax

from sparse_experts import host_memory
from sparse_experts.config import ConfigDict
from sparse_experts.errors import UserError
from sparse_experts.models import Model
from sparse_experts.training.selection import select, trained
from sparse_experts.training.state import TrainState

GIB = 2**30


def check_training(config: ConfigDict, model: Model, abstract: TrainState, length: dict[str, int]) -> None:
  """Raises UserError if state, gradients and activations of a step are larger than the memory.

  length: tokens of a row, as the task's `row_lengths`.
  """
  params = abstract.params
  _check(config, "training", {
      "parameters": _size(params), "gradients": _size(select(trained(config, params), params)),
      "optimizer": _size(abstract.opt_state), "buffers": _size(abstract.buffers),
      "activations": _activations(config, model, length) * _share(abstract)})


def check_loading(config: ConfigDict, abstract: TrainState) -> None:
  """Raises UserError if the parameters are larger than the memory."""
  _check(config, "the run", {"parameters": _size(abstract.params), "buffers": _size(abstract.buffers)})


def _check(config: ConfigDict, what: str, parts: dict[str, float]) -> None:
  given, total = config.train.memory, sum(parts.values())
  limit = host_memory.limit() if given is None else given * GIB
  if jax.default_backend() != "cpu" or total <= limit:
    return
  of = ", ".join(f"{name} {host_memory.words(size)}" for name, size in parts.items() if size)
  there = "this process may have" if given is None else "train.memory allows"
  raise UserError(f"{what} needs {host_memory.words(total)} or more ({of}), but {there} "
                  f"{host_memory.words(limit)}; choose a smaller model or train.batch_size, spread it over "
                  f"machines, or set train.memory={math.ceil(total / GIB)} if the memory is there")


def _size(tree: Any) -> int:
  """Bytes of the parts of these arrays that the devices of this process hold."""
  here = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * len(x.sharding.addressable_devices)
  return sum(here(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _activations(config: ConfigDict, model: Model, length: dict[str, int]) -> float:
  """Bytes of what the backward pass starts from: each layer's input, and the slots of one sparse layer."""
  rows = config.train.batch_size // config.train.accumulate
  width = config.model.embed_dim * jax.numpy.dtype(config.model.dtype).itemsize
  tokens = {name: rows * length["encoder" if name == "encoder" else "targets"] for name in model.stacks}
  inputs = sum(len(stack.kinds) * tokens[name] for name, stack in model.stacks.items())
  slots = (tokens[name] / size * layer.num_experts * (layer.capacity(size) or 0)
           for name, stack in model.stacks.items() for layer in stack.sparse_layers.values()
           if (size := layer.group_size) and layer.dispatch != "ragged")
  return width * (inputs + max(slots, default=0.0))


def _share(abstract: TrainState) -> float:
  """The part of the mesh's devices that this process has."""
  sharding = jax.tree.leaves(abstract.params)[0].sharding
  return len(sharding.addressable_devices) / len(sharding.device_set)
