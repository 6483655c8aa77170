"""Experts of one matrix each, for the sparse projections of attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.experts import Dropout
from sparse_experts.moe.grouped.layout import Layout, plan_layout
from sparse_experts.moe.grouped.matmul import grouped, linear
from sparse_experts.moe.grouped.ops import batched_ops


class LinearExperts(nnx.Module):
  """Projections y = x w per expert, from width d to f. Every device along `model` holds all of f.

  variance: of the initial weights, one number or one of each column. backend: as in `Experts`.
  """

  dropout = 0.0

  def __init__(self, num_experts: int, d: int, f: int, *, variance: Array | float, backend: str | None = None,
               rngs: nnx.Rngs):
    self.num_experts, self.backend = num_experts, backend
    std_F = jnp.broadcast_to(jnp.sqrt(jnp.asarray(variance, jnp.float32)), (f,))
    w_EDF = jax.random.normal(rngs.params(), (num_experts, d, f), jnp.float32) * std_F[None, None]
    self.w = nnx.Param(w_EDF, axes=("expert", "embed", None))

  @jax.named_scope("experts")
  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    return batched_ops.product(x_ECD, self.w[...])

  def plan_layout(self, size_E: Array, R: int, expected: int | None = None) -> Layout:
    return plan_layout(size_E, R, expected, self.backend)

  @jax.named_scope("experts")
  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> tuple[Array, Array]:
    return grouped(linear, x_PD, layout, self.w[...]), jnp.ones(x_PD.shape[0], bool)
