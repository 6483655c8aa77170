"""A dense student of a sparse teacher on the stream: what it keeps of the teacher's gain (Switch, 4.2).

Arms are those of `experiments/testbed/measure.py`. `teacher`: an arm, whose parameters outside experts and
router (here the head) the student starts from, and from whose probabilities it learns; `weight`: their share
in the loss, 0.25 in the paper. An arm without a teacher is the baseline.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

from flax import struct
from jax import Array

from experiments.testbed.measure import Bench, bench, loss, text
from sparse_experts.data.testbeds.stream import Batch, World
from sparse_experts.models.template import Tree
from sparse_experts.tasks import sums as task_sums


class Taught(struct.PyTreeNode):
  """A world and the teacher that was trained in it."""

  world: World
  params: Tree
  buffers: Tree

  def vectors(self, batch: Batch) -> Array:
    return self.world.vectors(batch)


class Student(Bench):
  """A program that is trained next to a teacher; it is measured as any other."""

  def teach(self, teacher: Bench, rate: float, weight: float) -> "Student":
    self._teacher, self._rate, self._weight = teacher, rate, weight
    return self

  def _start(self, seed: int) -> tuple[Tree, Tree, Any, Batch, Array]:
    params, buffers, world, *rest = super()._start(seed)
    taught = Taught(world, *self._teacher.trained(self._rate, seed))
    shared = {name: taught.params[name] for name in params if name != "layer"}
    return params | shared, buffers, taught, *rest

  def _token_loss(self, logits_GTV: Array, world: Any, batch: Batch) -> Array:
    teacher = self._teacher.template.bind(world.params, world.buffers)
    hard_GT = super()._token_loss(logits_GTV, world, batch)
    soft_GT = task_sums.soft_cross_entropy(logits_GTV, teacher(world.vectors(batch), batch.tokens)[0])
    return (1 - self._weight) * hard_GT + self._weight * soft_GT


def gain_kept(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """(baseline's loss - student's) / (baseline's - teacher's): 0 for the baseline, 1 for the teacher."""
  own = {key: value for key, value in arm.items() if key not in ("teacher", "weight")}
  if "teacher" not in arm:
    return 0.0
  student = _student(text(arm), quick).run(arm["rate"], seed)["loss"]
  baseline, teacher = loss(own, seed, quick), loss(arm["teacher"], seed, quick)
  return None if baseline is None or teacher is None else (baseline - student) / (baseline - teacher)


@functools.lru_cache(maxsize=4)
def _student(arm: str, quick: bool) -> Student:
  given = json.loads(arm)
  teacher, weight = given.pop("teacher"), given.pop("weight")
  return bench(given, quick, Student).teach(bench(teacher, quick), teacher["rate"], weight)
