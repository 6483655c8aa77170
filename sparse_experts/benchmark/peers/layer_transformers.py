"""The Mixtral block of Hugging Face transformers with our weights; read by `serve.py`.

Variants are names of its `experts_implementation`: `eager` is a loop over experts, `grouped_mm` sorts rows
and calls torch's grouped product. `batched_mm` copies the weights of every row's expert, here 90 GB.
"""

import os
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

PACKAGES = ("transformers", "torch", "numpy")


def make(shapes: dict[str, Any], arrays: dict[str, np.ndarray], variant: str) -> tuple:
  """For `serve.py`."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  config = MixtralConfig(
      hidden_size=shapes["embed_dim"], intermediate_size=shapes["expert_dim"], hidden_act="silu",
      num_local_experts=shapes["num_experts"], num_experts_per_tok=shapes["k"], num_hidden_layers=1,
      experts_implementation=variant)
  block = MixtralSparseMoeBlock(config).train()
  weights = {name: torch.from_numpy(a) for name, a in arrays.items()}
  with torch.no_grad():
    block.gate.weight.copy_(weights["router_DE"].T)
    block.experts.gate_up_proj.copy_(torch.cat([weights["gate_EDF"], weights["in_EDF"]], dim=-1).mT)
    block.experts.down_proj.copy_(weights["out_EFD"].mT)
  x_BLD = weights["x_TD"].view(-1, shapes["length"], shapes["embed_dim"]).requires_grad_()
  dy_BLD = weights["dy_TD"].view(x_BLD.shape)

  def layer():
    block.zero_grad(set_to_none=True)
    x_BLD.grad = None
    y_BLD = block(x_BLD)
    y_BLD.backward(dy_BLD)
    return y_BLD

  # Laid out as in the block: torch multiplies by the transposed weights.
  wide_EHD, out_EDF = (w.detach().clone().requires_grad_() for w in (
      block.experts.gate_up_proj, block.experts.down_proj))
  rows = shapes["tokens"] * shapes["k"] // shapes["num_experts"]
  x_ECD = torch.randn(shapes["num_experts"], rows, shapes["embed_dim"]).requires_grad_()

  def floor():
    wide_EHD.grad = out_EDF.grad = x_ECD.grad = None
    gate_ECF, in_ECF = torch.bmm(x_ECD, wide_EHD.mT).chunk(2, dim=-1)
    y_ECD = torch.bmm(torch.nn.functional.silu(gate_ECF) * in_ECF, out_EDF.mT)
    y_ECD.backward(x_ECD.detach())

  def results():
    y_BLD = layer()
    return (a.detach().reshape(shapes["tokens"], -1).numpy() for a in (y_BLD, x_BLD.grad))

  return layer, floor, results, 0.0
