"""BitLinear experts equal loops in value and gradient, and hold nothing but codes and a scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe import Heads, MoELayer, MultiHeadLayer, TernaryExperts, Tokens, TopKRouter
from sparse_experts.moe.ternary_experts import codes
from tests import oracle

G, T, D, F, E = 8, 6, 8, 5, 4
# float32 against float64 over sums of at most a hundred terms of order 1, where both round alike.
CLOSE = dict(rtol=5e-5, atol=5e-5)


def make_layer(dispatch="ragged", activation="swiglu", norm="rms", heads=None, width=D, backend=None):
  router = TopKRouter(width, E, 2, gate="renormalized", rngs=nnx.Rngs(0))
  router.w[...] = jax.random.normal(jax.random.key(1), (width, E))
  experts = TernaryExperts(E, width, F, activation, norm=norm, init_scale=4.0, backend=backend,
                           rngs=nnx.Rngs(2))
  make = MoELayer if heads is None else functools.partial(MultiHeadLayer, heads)
  return make(router, experts, dispatch, group_size=T)


def inputs():
  rng = np.random.default_rng(1)
  x_GTD, dy_GTD = rng.normal(size=(2, G, T, D))
  mask_GT = np.ones((G, T), bool)
  mask_GT[1, 4:] = mask_GT[3] = False
  return np.where(mask_GT[..., None], x_GTD, 0.0), dy_GTD, mask_GT


def run(layer, x, dy, mask):
  graphdef, state = nnx.split(layer)

  def f(state, x):
    y, routing = nnx.merge(graphdef, state)(x, Tokens(mask=jnp.asarray(mask)))
    return (y * dy).sum(), y

  (_, y), (dstate, dx) = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(state, jnp.float32(x))
  return y, nnx.to_pure_dict(dstate), dx


@pytest.mark.parametrize("dispatch, activation, norm", [
    ("ragged", "swiglu", "rms"), ("scatter", "relu", "layer"), ("einsum", "gelu", "none")])
def test_layer_equals_the_loops(dispatch, activation, norm):
  layer, (x, dy, mask) = make_layer(dispatch, activation, norm), inputs()
  weights = {n: np.asarray(w, np.float64) for n, w in nnx.to_pure_dict(nnx.state(layer.experts)).items()}
  w = np.asarray(layer.router.w[...], np.float64)
  lists = oracle.top_k(x @ w, mask, 2, "renormalized", "choice", None)
  expert = oracle.Ternary(norm)
  expected, _ = oracle.moe(x, lists, weights, activation, None, expert)
  dx, dgate, dweights = oracle.moe_gradient(x, lists, weights, activation, None, dy, expert)
  dlogit = oracle.top_k_gradient(x @ w, mask, 2, "renormalized", "choice", None, "first", dgate, 0.0, 0.0)
  dx = np.where(mask[..., None], dx + dlogit @ w.T, 0.0)
  assert expert.nearest > 5e-4, "float32 may round another way; choose another seed"
  y, found, got_dx = run(layer, x, dy, mask)
  np.testing.assert_allclose(y, expected, **CLOSE)
  np.testing.assert_allclose(got_dx, dx, **CLOSE)
  for name, value in dweights.items():
    np.testing.assert_allclose(found["experts"][name], value, **CLOSE, err_msg=name)


def test_backends_agree():
  x, dy, mask = inputs()
  a, b = (run(make_layer(backend=backend), x, dy, mask) for backend in ("slots", "ragged_dot"))
  for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-5)  # float32 sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2)])
def test_the_same_on_every_mesh_with_heads(mesh):
  """Scales are of whole matrices and rows, also where `model` could split them."""
  x, dy, mask = inputs()
  make = lambda: make_layer(heads=Heads(D, 2, rngs=nnx.Rngs(3)), width=D // 2)
  alone = run(make(), x, dy, mask)
  with partitioning.use(partitioning.make_mesh(*mesh)):
    spread = run(make(), x, dy, mask)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=2e-5)  # float32 sums in another order


def test_codes_are_ternary_and_stay_when_quantized_again():
  w = jax.random.normal(jax.random.key(0), (3, 20, 30)).at[1].set(0.0)
  code, value = codes(w)
  assert set(np.unique(code)) == {-1, 0, 1} and not np.any(code[1])
  np.testing.assert_allclose(value[::2, 0, 0], np.abs(w[::2]).mean((1, 2)), rtol=1e-6)  # float32 means
  again, smaller = codes(code * value)
  np.testing.assert_array_equal(again, code)
  assert (smaller[::2] < value[::2]).all()


def test_products_are_of_whole_numbers():
  """y of one row is a whole number times the row's step times the matrix's value."""
  experts = TernaryExperts(1, D, D, "relu", norm="none", init_scale=4.0, rngs=nnx.Rngs(0))
  x = np.asarray(jax.random.normal(jax.random.key(1), (1, 7, D)))
  w, _, _, _, _, w_out, _ = experts._weights
  code, value = map(np.asarray, codes(experts.w_in[...]))
  np.testing.assert_array_equal(w, code * value)  # bit for bit: the trick of the gradient adds nothing
  step = np.abs(x).max(-1, keepdims=True) / 127
  hidden = np.round(x / step) @ code[0]
  step_h = np.maximum(hidden * step * value[0], 0).max(-1, keepdims=True) / 127
  h = np.round(np.maximum(hidden * step * value[0], 0) / np.maximum(step_h, 1e-9))
  np.testing.assert_allclose(experts.batched(x), (h * step_h) @ np.asarray(w_out), rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(experts.batched(jnp.zeros((1, 2, D))), 0)


def test_arguments_out_of_range_are_one_line():
  with pytest.raises(UserError, match="model.ternary.norm='rmsnorm' is unknown; did you mean 'rms'"):
    TernaryExperts(2, 4, 4, norm="rmsnorm", rngs=nnx.Rngs(0))
  with pytest.raises(UserError, match="model.ternary.activation_bits=1 is out of range; choose 2 to 16"):
    TernaryExperts(2, 4, 4, activation_bits=1, rngs=nnx.Rngs(0))
