"""ST-MoE's multiplicative bias against the formula, [(GELU(x W11) * (x W12)) * B] W2, written in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.moe import Experts, MoELayer, TopKRouter, make_layer

E, D, F = 8, 16, 24
SIZE_E = np.array([3, 0, 1, 4, 0, 2, 1, 0])  # of 13 rows: two follow the last group
ROUNDING = dict(rtol=1e-5, atol=1e-5)  # float32, sums of tens of terms of order 1


def make_experts():
  experts = Experts(E, D, F, "geglu", init_scale=1.0, multiplicative_bias=True, rngs=nnx.Rngs(0))
  assert (experts.scale[...] == 1).all()
  experts.scale[...] = 1 + jax.random.normal(jax.random.key(1), (E, F))
  return experts


def numpy_expert(experts, e, x_RD):
  """(y_RD, hidden_RF before B) of one expert in float64."""
  w_gate, w_in, w_out, b_F = (np.asarray(a[...][e], np.float64) for a in (
      experts.w_gate, experts.w_in, experts.w_out, experts.scale))
  gelu = lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
  h_RF = gelu(x_RD @ w_gate) * (x_RD @ w_in)
  return (h_RF * b_F) @ w_out, h_RF


def test_values_and_gradient_by_hand():
  experts = make_experts()
  rng = np.random.default_rng(0)
  x_RD, g_RD = rng.normal(size=(2, 13, D)).astype(np.float32)
  graphdef, state = nnx.split(experts)

  def grouped(state, x_RD):
    experts = nnx.merge(graphdef, state)
    layout = experts.plan_layout(jnp.asarray(SIZE_E), 13)
    return layout.from_buffer(experts.grouped(layout.to_buffer(x_RD), layout), 13)

  @jax.jit
  def run(state, x_RD, g_RD):
    y_RD, vjp = jax.vjp(grouped, state, x_RD)
    return y_RD, vjp(g_RD)[0]

  y_RD, grad = run(state, x_RD, g_RD)
  expected_RD, expected_EF, start = np.zeros((13, D)), np.zeros((E, F)), 0
  for e, size in enumerate(SIZE_E):
    mine = slice(start, start + size)
    expected_RD[mine], h_RF = numpy_expert(experts, e, x_RD[mine].astype(np.float64))
    expected_EF[e] = (h_RF * (g_RD[mine] @ np.asarray(experts.w_out[...][e], np.float64).T)).sum(0)
    start += size
  np.testing.assert_allclose(y_RD, expected_RD, **ROUNDING)
  np.testing.assert_allclose(grad.scale[...], expected_EF, **ROUNDING)

  x_ECD = rng.normal(size=(E, 5, D)).astype(np.float32)
  expected_ECD = [numpy_expert(experts, e, x_ECD[e].astype(np.float64))[0] for e in range(E)]
  np.testing.assert_allclose(experts.batched(jnp.asarray(x_ECD)), expected_ECD, **ROUNDING)


def test_smear_merges_it_too():
  """All weight on one expert gives that expert."""
  experts = make_experts()
  x_BLD = np.random.default_rng(1).normal(size=(2, 3, D)).astype(np.float32)
  layer = make_layer("smear", D, experts, rngs=nnx.Rngs(4))
  y_BLD = layer.merged(jnp.asarray(x_BLD), jax.nn.one_hot(jnp.array([5, 2]), E))
  for row, e in enumerate((5, 2)):
    expected_LD, _ = numpy_expert(experts, e, x_BLD[row].astype(np.float64))
    np.testing.assert_allclose(y_BLD[row], expected_LD, **ROUNDING)


@pytest.mark.slow
def test_a_mesh_changes_nothing():
  """Experts over four devices, hidden units over two."""
  layer = MoELayer(TopKRouter(D, E, k=2, rngs=nnx.Rngs(2)), make_experts(), group_size=16)
  graphdef, state = nnx.split(layer)
  x_GTD = jax.random.normal(jax.random.key(3), (4, 16, D))

  def loss(state, x_GTD):
    y_GTD, _ = nnx.merge(graphdef, state)(x_GTD)
    return (y_GTD * jnp.arange(1.0, D + 1)[None, None]).sum()

  gradient = lambda: jax.jit(jax.grad(loss))(state, x_GTD).experts.scale[...]
  alone = gradient()
  with partitioning.use(partitioning.make_mesh(expert=4, model=2)):
    np.testing.assert_allclose(gradient(), alone, rtol=1e-5, atol=1e-4)  # sums of 30 terms up to 100
