import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.models import build
from sparse_experts.models.blocks import FeedForward
from sparse_experts.moe import BiasedExperts, Experts, MoELayer, TopKRouter
from sparse_experts.moe.experts import get_activation
from tests.models.tiny import VOCAB, tiny

E, D, F = 3, 5, 8
SIZE_E = (30, 0, 7)


def with_values(module):
  """Biases of ordinary size."""
  for i, name in enumerate(("b_in", "b_gate", "b_out")):
    if (b := getattr(module, name)) is not None:
      b[...] = jax.random.normal(jax.random.key(i), b.shape)
  return module


def make(backend, activation):
  keys = dict(backend=backend, rngs=nnx.Rngs(0))
  return with_values(BiasedExperts(E, D, F, activation, **keys) if activation == "relu" else
                     Experts(E, D, F, activation, bias=True, init_scale=1.0, **keys))


FUNCTIONS = {  # by hand, of numbers
    "relu": lambda x: max(x, 0.0),
    "geglu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "geglu_exact": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "swiglu": lambda x: x / (1 + math.exp(-x)),
}


def loops(module, x, expert=()):
  """One row in float64."""
  at = lambda name: np.asarray(getattr(module, name)[...], np.float64)[expert]
  h, function = x @ at("w_in") + at("b_in"), np.vectorize(FUNCTIONS[module.activation])
  h = function(h) if module.w_gate is None else function(x @ at("w_gate") + at("b_gate")) * h
  return h @ at("w_out") + at("b_out")


@pytest.mark.parametrize("activation", ["relu", "swiglu", "geglu_exact"])
def test_dense_ffns_have_the_same_biases(activation):
  ffn = with_values(FeedForward(D, F, activation, bias=True, key=jax.random.key(0)))
  x_BLD = np.random.default_rng(0).normal(size=(1, 3, D))
  np.testing.assert_allclose(
      ffn(jnp.float32(x_BLD))[0], [loops(ffn, x) for x in x_BLD[0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, gated", [("gelu", "geglu"), ("gelu_exact", "geglu_exact")])
def test_both_gelus_by_hand(name, gated):
  """They differ by up to 5e-4, the tolerance is that of float32."""
  x = np.linspace(-5, 5, 101)
  for activation in (name, gated):
    expected = [FUNCTIONS[gated](v) for v in x]
    np.testing.assert_allclose(get_activation(activation)[0](jnp.float32(x)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend, activation", [
    ("slots", "relu"), ("ragged_dot", "relu"), ("slots", "swiglu"), ("slots", "geglu_exact"),
    ("slots", "geglu")])
def test_both_forms_equal_the_loops(backend, activation):
  """Reserved rows, overflow rows, and empty buffer rows."""
  experts, expert_R = make(backend, activation), np.repeat(np.arange(E), SIZE_E)
  x_RD = np.random.default_rng(0).normal(size=(39, D))  # two rows belong to nobody
  layout = experts.plan_layout(jnp.array(SIZE_E), 39)
  if backend == "slots":
    assert 0 < layout.reserved < max(SIZE_E)
  y_PD = experts.grouped(layout.to_buffer(jnp.float32(x_RD)), layout)
  expected = [loops(experts, x, e) for x, e in zip(x_RD, expert_R)]
  np.testing.assert_allclose(layout.from_buffer(y_PD, 39)[:37], expected, rtol=1e-5, atol=1e-5)
  x_ECD = x_RD[:9].reshape(E, 3, D)
  np.testing.assert_allclose(experts.batched(jnp.float32(x_ECD)), [
      [loops(experts, x, e) for x in x_ECD[e]] for e in range(E)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["ragged", pytest.param("scatter", marks=pytest.mark.slow)])
def test_hidden_units_and_experts_on_other_devices_change_nothing(dispatch):
  """Value and gradient: each of two devices along `model` holds half of the hidden units, and b_out once."""
  def layer():
    experts = with_values(Experts(4, D, F, "geglu_exact", bias=True, init_scale=1.0, rngs=nnx.Rngs(0)))
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


def test_a_language_model_has_them_from_a_config_line():
  """In dense FFNs, experts and shared experts."""
  params, _ = jax.eval_shape(build(tiny(ffn_bias=True, shared_experts=1), VOCAB).init, jax.random.key(0))
  blocks = params["decoder"]["blocks"]["0"]
  assert blocks["0"]["ffn"].keys() >= {"b_in", "b_gate", "b_out"} <= blocks["1"]["ffn"]["experts"].keys()
  assert "b_gate" in blocks["1"]["ffn"]["shared"]["ffn"]
