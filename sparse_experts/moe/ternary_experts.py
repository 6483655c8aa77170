"""BitNet b1.58's BitLinear as experts: ternary weights and 8-bit activations, trained straight through."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.experts import Experts
from sparse_experts.moe.grouped.ops import ExpertOps, Layer

FLOOR = 1e-5  # of what a scale divides by, so that rows and matrices of zeros stay zeros
EPSILON = 1e-6  # of the norms


def _rms(x: Array) -> Array:
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)


# Of the rows of a product, before their quantization; none has weights.
NORMS: dict[str, Callable[[Array], Array]] = {
    "rms": _rms, "layer": lambda x: _rms(x - x.mean(-1, keepdims=True)), "none": lambda x: x}


class TernaryExperts(Experts):
  """`Experts` whose products are BitLinear layers: y = Q(norm(x)) Q(w), without biases.

  Q(w) has the values -a, 0 and a, a = mean |w| of an expert's matrix: the codes round(w / a), clipped
  to -1 to 1, times a. Q(x) has whole numbers of `activation_bits` bits, times the row's largest magnitude
  over the largest code. Gradients pass both quantizers as if they were not there, also beyond the clip; the
  weights that are trained stay float32. Ma et al. 2024 (BitNet b1.58), by the formulas of torchscale's
  `utils_quant.py` as read. Router, shared experts, dense FFNs and embeddings keep full precision; whether
  the paper's do is not known to us.

  norm: of a product's input, one of NORMS, without weights; the papers' models have one there.
  A row's scale needs all of its hidden units, so every device along `model` holds all of f.
  """

  def __init__(self, num_experts: int, d: int, f: int, activation: str = "relu", *, norm: str = "rms",
               activation_bits: int = 8, dropout: float = 0.0, init_scale: float = 0.1,
               multiplicative_bias: bool = False, backend: str | None = None, rngs: nnx.Rngs):
    check_known("model.ternary.norm", norm, NORMS)
    check(2 <= activation_bits <= 16, "model.ternary.activation_bits", activation_bits,
          "is out of range; choose 2 to 16")
    super().__init__(num_experts, d, f, activation, dropout=dropout, init_scale=init_scale,
                     multiplicative_bias=multiplicative_bias, backend=backend, rngs=rngs)
    self.norm, self.activation_bits = norm, activation_bits
    for w in (self.w_in, self.w_gate, self.w_out, self.scale):
      if w is not None:
        w.set_metadata(axes=tuple(None if name == "mlp" else name for name in w.axes))

  @property
  def _weights(self) -> Any:
    w_in, b_in, w_gate, b_gate, scale, w_out, b_out = super()._weights
    w_in, w_gate, w_out = (None if w is None else _ternary(w) for w in (w_in, w_gate, w_out))
    return w_in, b_in, w_gate, b_gate, scale, w_out, b_out

  @property
  def _layer(self) -> Layer:
    rows = functools.partial(_quantize_rows, self.norm, self.activation_bits)
    return functools.partial(_bit_linear, rows, super()._layer)


def _bit_linear(rows: Callable[[Array], Array], layer: Layer, ops: ExpertOps, x: Array, weights: Any,
                seed: Any, shared: Any) -> Array:
  """`layer` with rows quantized before each of its products."""
  product = lambda a, w_EDF: ops.product(rows(a), w_EDF)
  return layer(ops._replace(product=product), x, weights, seed, shared)


def codes(w_EDF: Array) -> tuple[Array, Array]:
  """(-1, 0 and 1 as w's type, [E, 1, 1] the value of 1) of each expert's matrix.

  Codes of codes times their value are the same, their value is smaller where a code is 0.
  """
  value_E11 = jnp.maximum(jnp.abs(w_EDF).mean((-2, -1), keepdims=True), FLOOR)
  return jnp.clip(jnp.round(w_EDF / value_E11), -1, 1), value_E11


def _ternary(w_EDF: Array) -> Array:
  code_EDF, value_E11 = codes(w_EDF)
  return _straight_through(code_EDF * value_E11, w_EDF)


def _quantize_rows(norm: str, bits: int, x: Array) -> Array:
  """Rows in float32, normalised and rounded, in x's type."""
  a, top = NORMS[norm](x.astype(jnp.float32)), 2 ** (bits - 1) - 1
  step = jnp.maximum(jnp.abs(a).max(-1, keepdims=True), FLOOR) / top
  return _straight_through(jnp.clip(jnp.round(a / step), -top - 1, top) * step, a).astype(x.dtype)


def _straight_through(value: Array, x: Array) -> Array:
  """`value`, exactly, with the gradient of x."""
  return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))
