"""How the formula of an expert reaches the weights: written once, it runs on any layout of rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


class ExpertOps(NamedTuple):
  """Rows with the weights of their own expert."""

  product: Callable[[Array, Array], Array]  # (a, w_EDF) -> each row times its expert's matrix, in a's dtype
  vector: Callable[[Array, DTypeLike], Array]  # (v_EF, dtype) -> each row's vector, broadcast against rows


# (ops, x, weights, per_row, shared) -> y
Layer = Callable[[ExpertOps, Array, Any, Any, Any], Array]


@jax.custom_vjp
def _batched_product(a_ECD: Array, w_EDF: Array) -> Array:
  return jnp.einsum("ecd,edf->ecf", a_ECD, w_EDF)


def _batched_product_backward(operands: tuple[Array, Array], dy_ECF: Array) -> tuple[Array, Array]:
  # JAX's own gives w's gradient transposed. XLA:CPU undoes that while it adds a block's to the others, on one
  # core and with strides: a quarter of a block's time.
  a_ECD, w_EDF = operands
  return jnp.einsum("ecf,edf->ecd", dy_ECF, w_EDF), jnp.einsum("ecd,ecf->edf", a_ECD, dy_ECF)


_batched_product.defvjp(lambda *operands: (_batched_product(*operands), operands), _batched_product_backward)

# For E experts with C rows each.
batched_ops = ExpertOps(
    product=lambda a_ECD, w_EDF: _batched_product(a_ECD, w_EDF.astype(a_ECD.dtype)),
    vector=lambda v_EF, dtype: v_EF[:, None].astype(dtype))
