"""E feed-forward networks with their own weights, called on rows grouped by expert."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from sparse_experts.moe.arguments import check_known
from sparse_experts.moe.grouped.layout import Layout, plan_layout
from sparse_experts.moe.grouped.matmul import grouped
from sparse_experts.moe.grouped.ops import ExpertOps, Layer, batched_ops


def exact_gelu(x: Array) -> Array:
  """x times the normal distribution's function of x (Hendrycks and Gimpel 2016)."""
  return jax.nn.gelu(x, approximate=False)


# name -> (function of the pre-activation, whether a second product gates it)
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "relu": (jax.nn.relu, False),
    "gelu": (jax.nn.gelu, False),  # tanh approximation, as T5.1.1 and V-MoE
    "gelu_exact": (exact_gelu, False),
    "geglu": (jax.nn.gelu, True),
    "geglu_exact": (exact_gelu, True),
    "swiglu": (jax.nn.silu, True),
}


class Dropout(struct.PyTreeNode):
  """Dropout of hidden units that is the same on every mesh and layout.

  Each row draws its mask from `key` and its own seed. `column` is the first of the global hidden units that
  this device holds (the `model` axis splits them).
  """

  key: Array
  seed: Array  # uint32, one per row
  column: Array | int = 0


def get_activation(name: str) -> tuple[Callable[[Array], Array], bool]:
  """(function, gated) of that name. Raises UserError if there is none."""
  check_known("activation", name, ACTIVATIONS)
  return ACTIVATIONS[name]


class Experts(nnx.Module):
  """y = act(x w_in) w_out per expert; gated: (act(x w_gate) * (x w_in)) w_out.

  `num_experts` and `f` are global and static; the weights an instance holds may be a device's share.
  Weights: truncated normal, variance init_scale / fan-in per expert (Switch, section 2.4: 0.1).
  `dropout` acts on the hidden units (Switch: 0.4 in fine-tuning). `multiplicative_bias`: each expert's hidden
  units are multiplied by a vector per expert, initially ones (Zoph et al. 2022, ST-MoE). `bias`: each product
  has one, initially 0: y = (act(x w_gate + b_gate) * (x w_in + b_in)) w_out + b_out.
  backend: of the grouped products, see `moe/grouped/matmul.py`; None: the platform's default.
  """

  INIT: tuple[Any, Any] = ("fan_in", "truncated_normal")
  def __init__(self, num_experts: int, d: int, f: int, activation: str = "relu", *, dropout: float = 0.0,
               init_scale: float = 0.1, multiplicative_bias: bool = False, bias: bool = False,
               backend: str | None = None, rngs: nnx.Rngs):
    self.num_experts, self.f, self.dropout, self.activation = num_experts, f, dropout, activation
    self.backend = backend
    init = jax.nn.initializers.variance_scaling(init_scale, *self.INIT, batch_axis=0)
    into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    widen = lambda: nnx.Param(init(rngs.params(), (num_experts, d, f), jnp.float32), axes=into)
    self.w_in = widen()
    self.w_gate = widen() if get_activation(activation)[1] else None
    self.w_out = nnx.Param(init(rngs.params(), (num_experts, f, d), jnp.float32), axes=out)
    one_EF = nnx.Param(jnp.ones((num_experts, f), jnp.float32), axes=("expert", "mlp"))
    self.scale = one_EF if multiplicative_bias else None
    zeros = lambda width, name: nnx.Param(jnp.zeros((num_experts, width)), axes=("expert", name))
    self.b_in = zeros(f, "mlp") if bias else None
    self.b_gate = zeros(f, "mlp") if bias and self.w_gate is not None else None
    self.b_out = zeros(d, "embed") if bias else None

  @jax.named_scope("experts")
  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    """C rows for each expert -> y_ECD."""
    return self._layer(batched_ops, x_ECD, self._weights, *self._randomness(dropout))

  def plan_layout(self, size_E: Array, R: int, expected: int | None = None) -> Layout:
    """A buffer for at most R rows, of which expert e has size_E[e]; `expected`: how many are usual."""
    return plan_layout(size_E, R, expected, self.backend)

  @jax.named_scope("experts")
  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> Array:
    """Buffer rows -> y_PD; only buffer rows that hold a row are to be read."""
    return grouped(self._layer, x_PD, layout, self._weights, *self._randomness(dropout))

  @property
  def _weights(self) -> Any:
    weights = self.w_in, self.b_in, self.w_gate, self.b_gate, self.scale, self.w_out, self.b_out
    *others, b_out_ED = jax.tree.map(lambda w: w[...], weights, is_leaf=lambda w: isinstance(w, nnx.Variable))
    # Devices along the mesh's `model` axis hold some hidden units each and are summed: each adds its share.
    return *others, None if b_out_ED is None else b_out_ED * (self.w_in.shape[-1] / self.f)

  @property
  def _layer(self) -> Layer:
    return functools.partial(_feed_forward, get_activation(self.activation)[0], self.dropout, self.f)

  def _randomness(self, dropout: Dropout | None) -> tuple[Any, Any]:
    """(by row, the same for all)."""
    if dropout is None or not self.dropout:
      return (), ()
    return dropout.seed, (dropout.key, jnp.asarray(dropout.column))


def _feed_forward(function: Callable[[Array], Array], rate: float, width: int, ops: ExpertOps, x: Array,
                  weights: Any, seed: Any, shared: Any) -> Array:
  """The formula of `Experts`. width: of all hidden units, also where a device holds only some."""
  w_in, b_in, w_gate, b_gate, scale, w_out, b_out = weights
  linear = lambda x, w, b: ops.product(x, w) if b is None else ops.product(x, w) + ops.vector(b, x.dtype)
  h = linear(x, w_in, b_in)
  h = function(h) if w_gate is None else function(linear(x, w_gate, b_gate)) * h
  if scale is not None:
    h *= ops.vector(scale, h.dtype)
  if shared:
    key, column = shared
    h = drop(h, seed, key, column, rate, width)
  return linear(h, w_out, b_out)


def drop(h: Array, seed: Array, key: Array, column: Array | int, rate: float, width: int) -> Array:
  """Drops hidden units of each row by its seed; `h` holds those from `column` on, of `width` in all."""

  def row_mask(seed: Array) -> Array:
    keep_F = jax.random.bernoulli(jax.random.fold_in(key, seed), 1 - rate, (width,))
    return jax.lax.dynamic_slice_in_dim(keep_F, column, h.shape[-1])

  keep = jax.vmap(row_mask)(seed.reshape(-1)).reshape(h.shape)
  return jnp.where(keep, h / (1 - rate), 0)
