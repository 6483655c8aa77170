"""Experts with biases: the MLP of a Vision Transformer, E times."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.experts import Dropout, Experts, get_activation
from sparse_experts.moe.grouped_matmul import grouped_matmul


class BiasedExperts(Experts):
  """y = act(x w_in + b_in) w_out + b_out per expert (Riquelme et al. 2021, V-MoE); no gated activation.

  Weights: uniform, variance init_scale / mean of fan-in and fan-out per expert, as ViT's MLP for 1; biases 0.
  Each expert draws its own; V-MoE's released code starts all of them equal.
  """

  def __init__(self, num_experts: int, d: int, f: int, activation: str = "gelu", *, dropout: float = 0.0,
               init_scale: float = 1.0, rngs: nnx.Rngs):
    if get_activation(activation)[1]:
      raise UserError(f"model.activation='{activation}' is gated, which experts with biases are not; choose"
                      " gelu or relu")
    self.num_experts, self.f, self.dropout, self.activation = num_experts, f, dropout, activation
    init = jax.nn.initializers.variance_scaling(init_scale, "fan_avg", "uniform", batch_axis=0)
    into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    self.w_in = nnx.Param(init(rngs.params(), (num_experts, d, f), jnp.float32), axes=into)
    self.b_in = nnx.Param(jnp.zeros((num_experts, f)), axes=("expert", "mlp"))
    self.w_out = nnx.Param(init(rngs.params(), (num_experts, f, d), jnp.float32), axes=out)
    self.b_out = nnx.Param(jnp.zeros((num_experts, d)), axes=("expert", "embed"))

  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    """C rows for each expert -> y_ECD."""
    product = lambda a, w: jnp.einsum("ecd,edf->ecf", a, w[...].astype(a.dtype))
    return self._mlp(x_ECD, product, lambda b_EF: b_EF[:, None], dropout)

  def grouped(self, x_RD: Array, size_E: Array, dropout: Dropout | None = None) -> tuple[Array, Array]:
    """Rows sorted by expert, size_E of each -> (y_RD, served_R); zeros after the last group."""
    expert_R = jnp.searchsorted(jnp.cumsum(size_E), jnp.arange(x_RD.shape[0]), side="right")
    product = lambda a, w: grouped_matmul(a, w[...].astype(a.dtype), size_E)
    of_row = lambda b_EF: b_EF.at[expert_R].get(mode="fill", fill_value=0)
    y_RD = self._mlp(x_RD, product, of_row, dropout)
    return y_RD, jnp.arange(x_RD.shape[0]) < size_E.sum()

  @jax.named_scope("experts")
  def _mlp(self, x, product, of_row, dropout):
    function, _ = get_activation(self.activation)
    h = function(product(x, self.w_in) + of_row(self.b_in[...].astype(x.dtype)))
    if self.dropout and dropout is not None:
      h = self._drop(h, dropout)
    # Devices along the mesh's `model` axis hold some hidden units each and are summed: each adds its share.
    share = self.w_in.shape[-1] / self.f
    return product(h, self.w_out) + of_row(self.b_out[...].astype(x.dtype)) * share
