"""What the first row that a process writes says of its run: versions, the machine, the size of the model."""

from typing import Any

import jax
from jax.sharding import Mesh

from sparse_experts.models import Model
from sparse_experts.version import versions


def about(model: Model, counted: dict[str, Any], tokens: int, mesh: Mesh, passes: int) -> dict[str, Any]:
  """The row's `run`, as docs/measures.md defines it.

  counted: of `models.counts`; tokens: of one step; passes: of each batch, see `train.consistency`.
  """
  return versions() | {
      "device": mesh.devices.flat[0].device_kind, "devices": mesh.size, "processes": jax.process_count(),
      "tokens_per_step": tokens, "model_flops_per_step": 3 * passes * counted["flops_per_token"] * tokens,
      "params_total": counted["params_total"], "params_active": counted["params_active"],
      "layers": {name: {"experts": layer.num_experts, "k": layer.k}
                 for name, layer in model.sparse_layers.items()}}
