"""E feed-forward networks with separate weights, called on rows grouped by expert."""

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from sparse_experts.errors import UserError, nearest
from sparse_experts.moe.grouped_matmul import grouped_matmul

# name -> (function of the pre-activation, whether a second product gates it)
ACTIVATIONS = {
    "relu": (jax.nn.relu, False),
    "gelu": (jax.nn.gelu, False),  # tanh approximation, as T5.1.1 and V-MoE
    "geglu": (jax.nn.gelu, True),
    "swiglu": (jax.nn.silu, True),
}


@struct.dataclass
class Dropout:
  """What an expert needs to drop hidden units the same way on every mesh and layout.

  Each row draws its mask from `key` and its own seed. `column` is the first of the global hidden
  units held here (the `model` axis splits them).
  """

  key: Array
  seed: Array  # uint32, one per row
  column: Array | int = 0


def get_activation(name: str):
  """(function, gated) of that name."""
  if name not in ACTIVATIONS:
    raise UserError(f"activation='{name}' is unknown{nearest(name, ACTIVATIONS)}")
  return ACTIVATIONS[name]


class LinearExperts(nnx.Module):
  """y = x w per expert, from width d to f: a projection. Every device along `model` holds all of f.

  variance: of the initial weights, one number or one of each column.
  """

  dropout = 0.0

  def __init__(self, num_experts: int, d: int, f: int, *, variance: Array | float, rngs: nnx.Rngs):
    self.num_experts = num_experts
    std_F = jnp.broadcast_to(jnp.sqrt(jnp.asarray(variance, jnp.float32)), (f,))
    w_EDF = jax.random.normal(rngs.params(), (num_experts, d, f), jnp.float32) * std_F[None, None]
    self.w = nnx.Param(w_EDF, axes=("expert", "embed", None))

  @jax.named_scope("experts")
  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    return jnp.einsum("ecd,edf->ecf", x_ECD, self.w[...].astype(x_ECD.dtype))

  @jax.named_scope("experts")
  def grouped(self, x_RD: Array, size_E: Array, dropout: Dropout | None = None) -> tuple[Array, Array]:
    y_RF = grouped_matmul(x_RD, self.w[...].astype(x_RD.dtype), size_E)
    return y_RF, jnp.arange(x_RD.shape[0]) < size_E.sum()


class Experts(nnx.Module):
  """y = act(x w_in) w_out per expert; gated: (act(x w_gate) * (x w_in)) w_out. No biases.

  `num_experts` and `f` are global and static; the weights an instance holds may be a device's share.
  Weights: truncated normal, variance init_scale / fan-in per expert (Switch, section 2.4: 0.1).
  `dropout` acts on the hidden units (Switch: 0.4 in fine-tuning).
  """

  def __init__(
      self, num_experts: int, d: int, f: int, activation: str = "relu", *, dropout: float = 0.0,
      init_scale: float = 0.1, rngs: nnx.Rngs,
  ):
    self.num_experts, self.f, self.dropout, self.activation = num_experts, f, dropout, activation
    _, gated = get_activation(activation)
    init = jax.nn.initializers.variance_scaling(init_scale, "fan_in", "truncated_normal", batch_axis=0)
    into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    self.w_in = nnx.Param(init(rngs.params(), (num_experts, d, f), jnp.float32), axes=into)
    gate = lambda: nnx.Param(init(rngs.params(), (num_experts, d, f), jnp.float32), axes=into)
    self.w_gate = gate() if gated else None
    self.w_out = nnx.Param(init(rngs.params(), (num_experts, f, d), jnp.float32), axes=out)

  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    """C rows for each expert -> y_ECD."""
    product = lambda a, w: jnp.einsum("ecd,edf->ecf", a, w[...].astype(a.dtype))
    return self._feed_forward(x_ECD, product, dropout)

  def grouped(self, x_RD: Array, size_E: Array, dropout: Dropout | None = None) -> tuple[Array, Array]:
    """Rows sorted by expert, size_E of each -> (y_RD, served_R); zeros after the last group."""
    product = lambda a, w: grouped_matmul(a, w[...].astype(a.dtype), size_E)
    return self._feed_forward(x_RD, product, dropout), jnp.arange(x_RD.shape[0]) < size_E.sum()

  @jax.named_scope("experts")
  def _feed_forward(self, x, product, dropout):
    function, gated = get_activation(self.activation)
    if gated:
      h = function(product(x, self.w_gate)) * product(x, self.w_in)
    else:
      h = function(product(x, self.w_in))
    if self.dropout and dropout is not None:
      h = self._drop(h, dropout)
    return product(h, self.w_out)

  def _drop(self, h, dropout: Dropout):
    def row_mask(seed):
      keep_F = jax.random.bernoulli(jax.random.fold_in(dropout.key, seed), 1 - self.dropout, (self.f,))
      return jax.lax.dynamic_slice_in_dim(keep_F, dropout.column, h.shape[-1])

    keep = jax.vmap(row_mask)(dropout.seed.reshape(-1)).reshape(h.shape)
    return jnp.where(keep, h / (1 - self.dropout), 0)
