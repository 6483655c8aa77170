"""The records that a report looks at, and what their numbers stand for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sparse_experts.models import Batch
from sparse_experts.tasks import Task


class Sample(NamedTuple):
  """A batch of records on the host. vocabulary: of the task; domains: names, as `Task.domains` has them."""

  batch: Batch
  task: Task
  vocabulary: Any
  domains: Sequence[str]
