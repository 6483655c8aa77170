"""A student learns from a trained run: `config.distill`, as Switch distils a sparse model to a dense one.

Fedus et al. 2021, section 4.2: the student's parameters outside experts start as the teacher's, and its loss
is 0.75 times the cross-entropy of the data's targets and 0.25 times that of the teacher's probabilities. The
teacher is dropless and without noise, so what it says of a batch is a function of the batch: its logits are
one more field of it, and nothing of the teacher is in the student's state or checkpoints.
"""

import hashlib
import os
from typing import Any

import jax

from sparse_experts import storage
from sparse_experts.config import ConfigDict, read_config, replaced
from sparse_experts.data import Record, Vocabulary
from sparse_experts.errors import UserError
from sparse_experts.models import Batch, names
from sparse_experts.tasks.text import TEACHER_LOGITS
from sparse_experts.training import init_from
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Steps
from sparse_experts.training.run import Run, load
from sparse_experts.training.state import TrainState

_LEFT_OUT = ("/experts/", "/router/")  # of what is copied


class Teacher:
  """A trained run that adds its logits to batches. `checkpoint`: a hash of the one it was read from."""

  def __init__(self, key: str, folder: str, run: Run, checkpoint: str):
    """key: `distill.teacher`, for messages."""
    self._key, self._folder, self._run, self.checkpoint = key, folder, run, checkpoint
    model = run.abstract_model("dropless")
    self._logits = jax.jit(lambda params, buffers, batch: model.apply(params, buffers, batch)[0])

  def __call__(self, batch: Batch) -> Batch:
    """The batch with the teacher's logits; call it where the mesh is in use."""
    return batch | {TEACHER_LOGITS: self._logits(self._run.params, self._run.buffers, batch)}

  @property
  def facts(self) -> dict[str, Any]:
    """What a run reports of its teacher."""
    return {"workdir": storage.absolute(self._folder), "step": self._run.step, "checkpoint": self.checkpoint}

  def refuse_another(self, then: str | None, workdir: str) -> None:
    """Raises UserError if the run was begun with another teacher, by its hash; None: no hash was kept."""
    if then is not None and then != self.checkpoint:
      raise UserError(f"distill.teacher={self._key} is now checkpoint {self.checkpoint}, step "
                      f"{self._run.step}, and {workdir} learns from {then}; bring that one back, or choose "
                      "another workdir")

  def to_start_from(self, config: ConfigDict, abstract: TrainState) -> ConfigDict:
    """`config` with `init_from`: what the teacher has of the same names, experts and routers aside."""
    theirs = names.state_shapes({"params": self._run.params, "buffers": self._run.buffers})
    ours = names.state_shapes({"params": abstract.params, "buffers": abstract.buffers})
    both = [name for name in ours if name in theirs and not any(part in name for part in _LEFT_OUT)]
    shapes = lambda of: {name: of[name] for name in both}
    if differ := names.difference(shapes(theirs), shapes(ours), most=1):
      raise UserError(f"distill.teacher={self._key}: {differ}; give the student the teacher's widths outside "
                      "experts, or set distill.copy=false")
    return replaced(config, {"init_from": f"{self._folder}@{self._run.step}", "init_take": ",".join(both)})


def open_teacher(config: ConfigDict, tokenizer: Vocabulary, example: Record) -> Teacher:
  """The run that `config.distill.teacher` names, on the mesh of `config`.

  example: a record of the student. Raises UserError for a run that reads other fields or another vocabulary.
  """
  key = config.distill.teacher
  folder, step = init_from.parse(key, "distill.teacher")
  kept = read_config(folder)
  theirs = wd.read_tokenizer(folder, kept)
  if theirs is not None and theirs.fingerprint != tokenizer.fingerprint:
    name = "bytes" if theirs.name == "bytes" else os.path.join(folder, "tokenizer.model")
    raise UserError(f"distill.teacher={key} has another tokenizer; set data.tokenizer={name}")
  steps = Steps(wd.checkpoints(folder))
  step = steps.choose(step)
  checkpoint = hashlib.sha256(str(steps.meta(step)).encode()).hexdigest()[:12]
  mesh = config.mesh.to_dict()
  run = load(folder, step, config=replaced(kept, {
      f"mesh.{name}": value for name, value in mesh.items() if name != "dcn"} | {
      f"mesh.dcn.{name}": value for name, value in mesh["dcn"].items()}))
  model, devices = run.abstract_model("dropless"), config.mesh.expert
  for layer, its in model.sparse_layers.items():
    if its.num_experts % devices:
      raise UserError(f"distill.teacher={key} has {its.num_experts} experts in {layer}, which do not divide "
                      f"over mesh.expert={devices}; choose a divisor")
  if lacking := [field for field in model.fields if field not in example]:
    raise UserError(f"distill.teacher={key} is a {kept.model.name} and reads {lacking[0]}, which a "
                    f"{config.model.name} has not; choose model.name={kept.model.name}")
  return Teacher(key, folder, run, checkpoint)
