"""Experts with biases: the MLP of a Vision Transformer, E times."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe.experts import Experts, get_activation


class BiasedExperts(Experts):
  """y = act(x w_in + b_in) w_out + b_out per expert (Riquelme et al. 2021, V-MoE); no gated activation.

  Weights: uniform, variance init_scale / mean of fan-in and fan-out per expert, as ViT's MLP for 1; biases 0.
  Experts start different from each other; in V-MoE's released code they start equal.
  """

  INIT = ("fan_avg", "uniform")

  def __init__(self, num_experts: int, d: int, f: int, activation: str = "gelu", *, dropout: float = 0.0,
               init_scale: float = 1.0, backend: str | None = None, rngs: nnx.Rngs):
    if get_activation(activation)[1]:
      raise UserError(f"model.activation='{activation}' is gated, which experts with biases are not; choose"
                      " gelu or relu")
    super().__init__(num_experts, d, f, activation, dropout=dropout, init_scale=init_scale, backend=backend,
                     rngs=rngs)
    self.b_in = nnx.Param(jnp.zeros((num_experts, f)), axes=("expert", "mlp"))
    self.b_out = nnx.Param(jnp.zeros((num_experts, d)), axes=("expert", "embed"))

  @property
  def _weights(self) -> Any:
    # Devices along the mesh's `model` axis hold some hidden units each and are summed: each adds its share.
    *others, b_out_ED = super()._weights
    return *others, b_out_ED * (self.w_in.shape[-1] / self.f)
