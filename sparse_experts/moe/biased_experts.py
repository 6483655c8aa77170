"""Experts with biases: the MLP of a Vision Transformer, E times."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.experts import Experts, drop, get_activation
from sparse_experts.moe.grouped.ops import ExpertOps


class BiasedExperts(Experts):
  """y = act(x w_in + b_in) w_out + b_out per expert (Riquelme et al. 2021, V-MoE); no gated activation.

  Weights: uniform, variance init_scale / mean of fan-in and fan-out per expert, as ViT's MLP for 1; biases 0.
  Experts start different from each other; in V-MoE's released code they start equal.
  """

  def __init__(self, num_experts: int, d: int, f: int, activation: str = "gelu", *, dropout: float = 0.0,
               init_scale: float = 1.0, backend: str | None = None, rngs: nnx.Rngs):
    if get_activation(activation)[1]:
      raise UserError(f"model.activation='{activation}' is gated, which experts with biases are not; choose"
                      " gelu or relu")
    self.num_experts, self.f, self.dropout, self.activation = num_experts, f, dropout, activation
    self.backend = backend
    init = jax.nn.initializers.variance_scaling(init_scale, "fan_avg", "uniform", batch_axis=0)
    into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    self.w_in = nnx.Param(init(rngs.params(), (num_experts, d, f), jnp.float32), axes=into)
    self.b_in = nnx.Param(jnp.zeros((num_experts, f)), axes=("expert", "mlp"))
    self.w_out = nnx.Param(init(rngs.params(), (num_experts, f, d), jnp.float32), axes=out)
    self.b_out = nnx.Param(jnp.zeros((num_experts, d)), axes=("expert", "embed"))

  @property
  def _weights(self) -> tuple[Array, ...]:
    # Devices along the mesh's `model` axis hold some hidden units each and are summed: each adds its share.
    share = self.w_in.shape[-1] / self.f
    return self.w_in[...], self.b_in[...], self.w_out[...], self.b_out[...] * share

  @property
  def _layer(self) -> Callable[..., Array]:
    return functools.partial(_mlp, get_activation(self.activation)[0], self.dropout, self.f)


def _mlp(function: Callable[[Array], Array], rate: float, width: int, ops: ExpertOps, x: Array,
         weights: tuple[Array, Array, Array, Array], seed: Any, shared: Any) -> Array:
  w_in, b_in, w_out, b_out = weights
  h = function(ops.product(x, w_in) + ops.vector(b_in, x.dtype))
  if shared:
    h = drop(h, seed, *shared, rate, width)
  return ops.product(h, w_out) + ops.vector(b_out, x.dtype)
