import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe import BiasedExperts, MoELayer, TopKRouter

E, D, F = 3, 5, 8
SIZE_E = (30, 0, 7)


def make(backend):
  experts = BiasedExperts(E, D, F, "relu", backend=backend, rngs=nnx.Rngs(0))
  for i, name in enumerate(("b_in", "b_out")):
    b = getattr(experts, name)
    b[...] = jax.random.normal(jax.random.key(i), b.shape)
  return experts


def loops(experts, x, expert):
  """One row in float64."""
  w_in, b_in, w_out, b_out = (np.asarray(getattr(experts, n)[...], np.float64)[expert]
                              for n in ("w_in", "b_in", "w_out", "b_out"))
  return np.maximum(x @ w_in + b_in, 0) @ w_out + b_out


@pytest.mark.parametrize("backend", ["slots", "ragged_dot"])
def test_both_forms_equal_the_loops(backend):
  """Reserved rows, overflow rows, and empty buffer rows."""
  experts, expert_R = make(backend), np.repeat(np.arange(E), SIZE_E)
  x_RD = np.random.default_rng(0).normal(size=(39, D))  # two rows belong to nobody
  layout = experts.plan_layout(jnp.array(SIZE_E), 39)
  if backend == "slots":
    assert 0 < layout.reserved < max(SIZE_E)
  y_PD, served_P = experts.grouped(layout.to_buffer(jnp.float32(x_RD)), layout)
  assert served_P.all()
  expected = [loops(experts, x, e) for x, e in zip(x_RD, expert_R)]
  np.testing.assert_allclose(layout.from_buffer(y_PD, 39)[:37], expected, rtol=1e-5, atol=1e-5)
  x_ECD = x_RD[:9].reshape(E, 3, D)
  np.testing.assert_allclose(experts.batched(jnp.float32(x_ECD)), [
      [loops(experts, x, e) for x in x_ECD[e]] for e in range(E)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["ragged", pytest.param("scatter", marks=pytest.mark.slow)])
def test_hidden_units_and_experts_on_other_devices_change_nothing(dispatch):
  """Value and gradient: each of two devices along `model` holds half of the hidden units, and b_out once."""
  def layer():
    experts = BiasedExperts(4, D, F, "gelu", rngs=nnx.Rngs(0))
    experts.b_out[...] = jax.random.normal(jax.random.key(1), (4, D))
    return MoELayer(TopKRouter(D, 4, 2, rngs=nnx.Rngs(1)), experts, dispatch, 6, 1.0, "megablocks")

  graphdef, state = nnx.split(layer())
  x_GTD = jax.random.normal(jax.random.key(2), (4, 6, D))

  def loss(state, x_GTD):
    y_GTD, _ = nnx.merge(graphdef, state)(x_GTD)
    return jnp.sin(y_GTD).sum()

  expected = jax.jit(jax.value_and_grad(loss))(state, x_GTD)
  with partitioning.use(partitioning.make_mesh(1, 2, 2)):
    got = jax.jit(jax.value_and_grad(loss))(state, x_GTD)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gated_activations_are_refused():
  with pytest.raises(UserError, match="model.activation='swiglu' is gated.*choose gelu or relu"):
    BiasedExperts(E, D, F, "swiglu", rngs=nnx.Rngs(0))
