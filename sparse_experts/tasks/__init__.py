"""What a run is about, by `data.objective`: each task is one object, in one file and one line here.

Importing this package or a task's file imports no jax: configs are checked and results read before it.
"""

import importlib

from sparse_experts.config import ConfigDict
from sparse_experts.errors import UserError, nearest
from sparse_experts.tasks.task import Task

# data.objective -> where its class is, below sparse_experts.tasks; imported when it is needed.
TASKS = {
  "causal": "text:Causal",
  "span_corruption": "text:SpanCorruption",
  "text_classification": "labelled:TextClassification",
  "softmax": "images:Images",
  "sigmoid": "images:Images",
  "contrastive": "pairs:Contrastive",
}


def task_of(config: ConfigDict) -> Task:
  """The task of `config.data.objective`, for that config."""
  return _class(config.data.objective)(config)


def check(config: ConfigDict) -> None:
  """Raises UserError if the model does not fit the task, or for what the task itself refuses."""
  task, model = task_of(config), config.model.name
  if model not in task.models:
    fitting = [name for name in TASKS if model in _class(name).models]
    raise UserError(f"data.objective='{config.data.objective}' does not fit model.name='{model}'; choose "
                    f"data.objective={' or '.join(fitting)} or another model")
  task.check()


def _class(objective: str) -> type[Task]:
  if objective not in TASKS:
    raise UserError(f"data.objective='{objective}' is unknown{nearest(objective, TASKS)}")
  module, name = TASKS[objective].split(":")
  return getattr(importlib.import_module(f"sparse_experts.tasks.{module}"), name)
