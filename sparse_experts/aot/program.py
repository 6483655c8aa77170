"""Compiles a config's train step for devices that need not exist, and reports memory and collectives.

Only shapes are used: nothing is initialized and no data are read. The devices may be a TPU
topology's (`aot/chips.py`) or simulated ones.
"""

import dataclasses
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from sparse_experts import partitioning
from sparse_experts.config import ConfigDict
from sparse_experts.data import Vocabulary
from sparse_experts.errors import UserError
from sparse_experts.models import Model, build, counts
from sparse_experts.profiling import hlo
from sparse_experts.tasks import task_of
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.setup import check_groups
from sparse_experts.training.state import TrainState, describe_state, place
from sparse_experts.training.step import jit_train_step

GIB = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A config's train step on a mesh: shapes and shardings."""

  config: ConfigDict
  tokenizer: Vocabulary
  mesh: jax.sharding.Mesh
  model: Model
  optimizer: optax.GradientTransformation
  state: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]

  def arguments(self) -> dict[str, int]:
    """Bytes per device of the step's arguments by part, without what layouts pad."""
    parts = {"parameters": self.state.params, "optimizer": self.state.opt_state,
             "router_state": self.state.buffers, "batch": self.batch}
    return {name: sum(map(_bytes, jax.tree.leaves(part))) for name, part in parts.items()}

  def counts(self) -> dict[str, float]:
    """Parameters, and FLOPs of a training step on all devices together; see docs/measures.md."""
    lengths = task_of(self.config).row_lengths(self.tokenizer)
    counted = counts.describe(self.config, self.tokenizer.vocab_size, lengths["targets"])
    tokens = self.config.train.batch_size * (lengths["encoder"] + lengths["targets"])
    products, head = 4 if self.config.model.remat else 3, counted["flops"]["head"]
    executed = products * (counted["executed_flops_per_token"] - head) + 3 * head
    return {"params_total": counted["params_total"], "params_active": counted["params_active"],
            "flops": executed * tokens, "model_flops": 3 * counted["flops_per_token"] * tokens}


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled step: bytes per device by part, and collectives; None if the compiler gave up.

  too_large: the compiler's message, if a device's memory is too small.
  """

  plan: Plan
  seconds: float
  memory: dict[str, int] | None
  collectives: list[hlo.Collective] | None
  too_large: str = ""

  @property
  def peak(self) -> int | None:
    return None if self.memory is None else sum(self.memory.values())

  @property
  def required(self) -> float | None:
    """Bytes per device that `too_large` names: of all, or of the temporaries alone."""
    said = re.search(r"(?:required[^(]*\(|Used )([\d.]+)([KMGT])", self.too_large)
    return float(said[1]) * 1024**(1 + "KMGT".index(said[2])) if said else None


class Shapes:
  """A config's model, state and batch, independent of the mesh."""

  def __init__(self, config: ConfigDict, tokenizer: Vocabulary):
    task = task_of(config)
    self.tokenizer, self.lengths = tokenizer, task.row_lengths(tokenizer)
    self.model = build(config, tokenizer.vocab_size, "train")
    self.optimizer = make_optimizer(config, self.model.axes)
    self.state, self.axes = describe_state(self.model, self.optimizer)
    self.batch = {name: np.asarray(a) for name, a in task.example(tokenizer).items()}

  def plan(self, config: ConfigDict, devices: Sequence[Any]) -> Plan:
    """On `config.mesh`; `config` may differ from the first one in its mesh only.

    Raises UserError if the mesh does not use all the devices, and in all cases in which training would.
    """
    m = config.mesh
    if (product := m.data * m.expert * m.model) != len(devices):
      raise UserError(
          f"mesh data={m.data} x expert={m.expert} x model={m.model} uses {product} devices of "
          f"{len(devices)}; set --config.mesh.* or let --find look for a mesh")
    check_groups(config, self.model, self.lengths)
    mesh = partitioning.make_mesh(m.data, m.expert, m.model, devices, m.dcn)
    rows = partitioning.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct((config.train.batch_size, *a.shape), a.dtype, sharding=rows)
             for name, a in self.batch.items()}
    return Plan(config, self.tokenizer, mesh, self.model, self.optimizer,
                place(self.state, self.axes, mesh, m.fsdp), batch)


def compile_step(plan: Plan) -> Program:
  """The step that `train` would run."""
  start = time.perf_counter()
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=partitioning.replicated(plan.mesh))
  on_tpu = plan.mesh.devices.flat[0].platform == "tpu"
  # tokamax asks the default device which kernel it can run.
  with partitioning.use(plan.mesh), jax.default_device(plan.mesh.devices.flat[0]), \
       tempfile.TemporaryDirectory() as folder:
    # libtpu writes the text itself: `as_text` fails on some of its programs, as jaxlib does not read
    # asynchronous instructions of several arrays.
    options: dict[str, str | bool] | None = (
        {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if on_tpu else None)
    step = jit_train_step(plan.model, plan.optimizer, plan.config, plan.state, plan.mesh)
    try:
      compiled = step.lower(plan.state, plan.batch, key).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      return Program(plan, time.perf_counter() - start, None, None, _memory_message(str(e)))
    seconds = time.perf_counter() - start
    text = _read(folder) if on_tpu else compiled.as_text() or ""
  return Program(plan, seconds, _memory(plan, compiled.memory_analysis()),
                 hlo.collectives(text, plan.mesh.size))


def _read(folder: str) -> str:
  (path,) = pathlib.Path(folder).glob("*train_step*.after_optimizations.txt")
  return path.read_text(encoding="utf-8")


def _memory_message(message: str) -> str:
  """The compiler's message about memory, on one line."""
  match = re.search(r"(?:Ran out of memory|Used )[^\n]*", message)
  return (match.group(0) if match else message.splitlines()[0]).strip()


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
  return math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize


def _memory(plan: Plan, stats: Any) -> dict[str, int]:
  """Bytes per device; the parts add up to what the program needs at once."""
  parts = plan.arguments()
  rest = stats.argument_size_in_bytes - sum(parts.values())
  parts["batch"] += min(rest, 0)  # arrays of a record that the step does not read are no arguments
  return parts | {"padding": max(rest, 0), "temporaries": stats.temp_size_in_bytes,
                  "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
                  "program": stats.generated_code_size_in_bytes}
