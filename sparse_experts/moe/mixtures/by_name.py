"""Layers that stand where `MoELayer` does and assign no token to an expert, by name."""

from typing import Any

from flax import nnx

from sparse_experts.moe.experts import Experts
from sparse_experts.moe.mixtures.smear import SmearLayer
from sparse_experts.moe.mixtures.soft_moe import SoftMoELayer
from sparse_experts.moe.registry import construct

LAYERS: dict[str, type[nnx.Module]] = {"soft_moe": SoftMoELayer, "smear": SmearLayer}


def make_layer(name: str, d: int, experts: Experts, *, rngs: nnx.Rngs, **arguments: Any) -> nnx.Module:
  """The layer of that name around `experts`; `arguments` are its constructor's."""
  return construct(LAYERS[name], name, d, experts, rngs=rngs, **arguments)
