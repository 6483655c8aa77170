"""Experts of one matrix each, for the sparse projections of attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.experts import Experts
from sparse_experts.moe.grouped.matmul import linear
from sparse_experts.moe.grouped.ops import Layer


class LinearExperts(Experts):
  """Projections y = x w per expert, from width d to f. Every device along `model` holds all of f.

  variance: of the initial weights, one number or one of each column. backend: as in `Experts`.
  """

  def __init__(self, num_experts: int, d: int, f: int, *, variance: Array | float, backend: str | None = None,
               rngs: nnx.Rngs):
    self.num_experts, self.f, self.dropout, self.backend = num_experts, f, 0.0, backend
    std_F = jnp.broadcast_to(jnp.sqrt(jnp.asarray(variance, jnp.float32)), (f,))
    w_EDF = jax.random.normal(rngs.params(), (num_experts, d, f), jnp.float32) * std_F[None, None]
    self.w = nnx.Param(w_EDF, axes=("expert", "embed", None))

  @property
  def _weights(self) -> Array:
    return self.w[...]

  @property
  def _layer(self) -> Layer:
    return linear
