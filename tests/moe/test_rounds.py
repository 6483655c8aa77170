"""A dropless exchange of any room equals two Python loops: what does not fit travels in further rounds."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.moe import Experts, GatingDropout, MoELayer, TopKRouter
from sparse_experts.moe.parallel import all_to_all
from tests import oracle
from tests.moe.test_parallel import emulated

G, T, D, F, E = 8, 4, 5, 6, 8
CLOSE = dict(rtol=2e-5, atol=2e-5)  # float32 against float64 over sums of at most a hundred terms of order 1
FACTORS = (1.0, 1.5, 2.0, None)
LISTS = ("all to one", "uneven", "even")


def make_layer(factor, k=1, dropout=0.0, exchange=None):
  router = TopKRouter(D, E, k, gate="raw", rngs=nnx.Rngs(0))
  experts = Experts(E, D, F, "swiglu", init_scale=4.0, dropout=dropout, rngs=nnx.Rngs(1))
  return MoELayer(router, experts, "ragged", T, exchange_rows_factor=factor, exchange=exchange)


@functools.cache
def router_weights(name):
  """Weights for which all 32 tokens choose one expert, about half of them one, or each as it comes."""
  w_DE = 0.3 * np.random.default_rng(2).normal(size=(D, E))
  w_DE[0] = 0  # the tokens' first entry is large
  if name == "all to one":
    w_DE[0] += 3 * (np.arange(E) == 5)
  elif name == "uneven":
    w_DE[1] += 3 * (np.arange(E) == 5)
  return w_DE


def inputs():
  x_GTD, dy_GTD = np.random.default_rng(0).normal(size=(2, G, T, D))
  x_GTD[..., 0] = 2 + np.abs(x_GTD[..., 0])
  return x_GTD, dy_GTD


@functools.cache
def expected(name, k):
  """(y, dx, router's gradient, experts' gradients, each expert's rows), by the loops."""
  (x, dy), w = inputs(), router_weights(name)
  mask = np.ones((G, T), bool)
  weights = {n: np.asarray(a, np.float64)
             for n, a in nnx.to_pure_dict(nnx.state(make_layer(None).experts)).items()}
  lists = oracle.top_k(x @ w, mask, k, "raw", "choice", None)
  y, _ = oracle.moe(x, lists, weights, "swiglu", None)
  dx, dgate, dweights = oracle.moe_gradient(x, lists, weights, "swiglu", None, dy)
  dlogit = oracle.top_k_gradient(x @ w, mask, k, "raw", "choice", None, "first", dgate, 0.0, 0.0)
  rows = np.bincount([e for group in lists for _, e, _, _ in group], minlength=E)
  return y, dx + dlogit @ w.T, np.einsum("gtd,gte->de", x, dlogit), dweights, rows


@functools.cache
def program(factor, k, shape):
  """(state, x, dy) -> (gradients of state and x, (y, metrics)) on a mesh of that shape."""
  graphdef, state = nnx.split(make_layer(factor, k))

  def objective(state, x, dy):
    y, routing = nnx.merge(graphdef, state)(x)
    return (y * dy).sum(), (y, routing.metrics)

  return jax.jit(jax.grad(objective, (0, 1), has_aux=True)), state, partitioning.make_mesh(*shape)


def check_equals_the_loops(factor, k, shape, name):
  """And returns the metrics."""
  call, state, mesh = program(factor, k, shape)
  state["router"]["w"][...] = jnp.float32(router_weights(name))
  x, dy = map(jnp.float32, inputs())
  with partitioning.use(mesh):
    x, dy = jax.device_put((x, dy), partitioning.batch_sharding(mesh))
    (dstate, dx), (y, metrics) = jax.device_get(call(state, x, dy))
  expected_y, expected_dx, dw, dweights, _ = expected(name, k)
  np.testing.assert_allclose(y, expected_y, **CLOSE)
  np.testing.assert_allclose(dx, expected_dx, **CLOSE)
  np.testing.assert_allclose(dstate["router"]["w"][...], dw, **CLOSE)
  for weight, value in dweights.items():
    np.testing.assert_allclose(dstate["experts"][weight][...], value, **CLOSE)
  return metrics


def cases():
  """A slow case, unless it is one of those that cost little and show most."""
  fast = [(2, 1.0), (4, 1.5), (8, 1.0)]
  return [pytest.param(n, f, marks=[pytest.mark.slow] * ((n, f) not in fast))
          for n in (2, 4, 8) for f in FACTORS]


@pytest.mark.parametrize("devices, factor", cases())
def test_any_room_and_any_list(devices, factor):
  """32 rows all to one expert among them. The metric says whether more than one round was needed."""
  for name in LISTS:
    metrics = check_equals_the_loops(factor, 1, (1, devices, 1), name)
    assert metrics["dropped"] == (0, G * T)
    if factor is None:
      assert "exchange_overflowed" not in metrics
    elif name == "all to one":
      assert expected(name, 1)[-1].max() == 32
      # Where two devices exchange, factor 2 is the worst case.
      assert metrics["exchange_overflowed"] == (factor < devices, 1)


@pytest.mark.parametrize("factor, shape", [
    (1.0, (2, 4, 1)), pytest.param(0.9, (2, 2, 2), marks=pytest.mark.slow)])
def test_every_mesh_takes_the_same_rounds(factor, shape):
  """Rows of one data-parallel part may need more rounds than those of another; two experts a token."""
  for name in LISTS:
    metrics = check_equals_the_loops(factor, 2, shape, name)
    assert metrics["dropped"] == (0, 2 * G * T)
  assert metrics["exchange_overflowed"] == (1, 1)  # two rows each from 8 devices: hardly ever even


@pytest.mark.parametrize("shape, factor", [
    ((1, 4, 1), 1.0), pytest.param((2, 2, 2), 1.5, marks=pytest.mark.slow)])
def test_ragged_exchange_in_rounds(monkeypatch, shape, factor):
  """Where all sources share the room, the device that all rows are for needs more rounds, or none does."""
  monkeypatch.setitem(all_to_all.EXCHANGES, "cpu", all_to_all.RAGGED)
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
  program.cache_clear()
  for name in LISTS:
    over, calls = check_equals_the_loops(factor, 1, shape, name)["exchange_overflowed"]
    rows = expected(name, 1)[-1].reshape(shape[1], -1).sum(1)  # of each device along `expert`
    if shape[0] == 1:
      assert (over, calls) == (rows.max() > G * T // shape[1] * factor, 1)
    else:
      assert calls == 1 and (over == 1 or name != "all to one")
  program.cache_clear()


@pytest.mark.slow
def test_dropout_masks_do_not_depend_on_rounds():
  x, dy = map(jnp.float32, inputs())

  def call(factor, shape):
    layer = make_layer(factor, dropout=0.5)
    layer.router.w[...] = jnp.float32(router_weights("uneven"))
    graphdef, state = nnx.split(layer)
    forward = lambda state, x: nnx.merge(graphdef, state)(x, key=jax.random.key(3))
    objective = lambda state, x: (forward(state, x)[0] * dy).sum()
    with partitioning.use(partitioning.make_mesh(*shape)):
      both = jax.jit(lambda state, x: (forward(state, x)[0], jax.grad(objective, (0, 1))(state, x)))
      return jax.tree.leaves(jax.device_get(both(state, x)))

  for got, alone in zip(call(1.0, (1, 4, 1)), call(None, (1, 1, 1)), strict=True):
    np.testing.assert_allclose(got, alone, **CLOSE)


def test_tokens_kept_local_take_no_further_round():
  """Gating Dropout: all rows of a device stay there, however many there are."""
  call = lambda rate: jax.jit(lambda x: make_layer(1.0, exchange=GatingDropout(rate, machines=4))(
      x, key=jax.random.key(0))[1].metrics["exchange_overflowed"])(jnp.float32(inputs()[0]))
  with partitioning.use(partitioning.make_mesh(1, 4, 1)):
    assert [float(call(rate)[0]) for rate in (0.0, 1.0)] == [1, 0]


@pytest.mark.parametrize("factor, exchanges, rows", [(1.0, 9, 1), (None, 4, 4)])
def test_a_round_holds_the_bound(factor, exchanges, rows):
  """Two devices exchange at most 1 of 4 rows at once; the rounds after the first stand in loops.

  Two exchanges forward and two backward as without a bound; in the loops two, and three, as the backward pass
  makes a round's rows again.
  """
  call, state, mesh = program(factor, 1, (1, 8, 1))
  x, dy = map(jnp.float32, inputs())
  with partitioning.use(mesh):
    text = call.lower(state, x, dy).compile().as_text()
  assert re.findall(r" = \(f32\[1,(\d+),\d+\].* all-to-all\(", text) == [str(rows)] * exchanges
