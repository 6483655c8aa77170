"""Gating Dropout: one draw, experts of one's machine, the same numbers on any mesh, no exchange if local."""

import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, GatingDropout, MoELayer, TopKRouter, make_router

G, T, D, F, E = 8, 6, 8, 12, 8
KEYS = range(6)  # some of which keep tokens local
CLOSE = dict(rtol=2e-5, atol=2e-5)  # float32, sums of tens of terms of order 1 in another order


def layer_of(gating, dispatch="ragged", factor=None, dropout=0.0):
  router = TopKRouter(D, E, 2, gate="renormalized", rngs=nnx.Rngs(0))
  router.w[...] *= 50
  experts = Experts(E, D, F, "gelu", init_scale=4.0, dropout=dropout, rngs=nnx.Rngs(1))
  return MoELayer(router, experts, dispatch, T, factor, exchange=gating, min_capacity=1)


def grads_and_output(layer):
  """A function of (state, x, dy, key); one compile for all keys."""
  graphdef, state = nnx.split(layer)

  def objective(state, x, dy, key):
    y, routing = nnx.merge(graphdef, state)(x, key=key)
    return (y * dy).sum(), (y, routing.kept, routing.expert)

  return jax.grad(objective, (0, 1), has_aux=True), state


def inputs():
  return jax.random.normal(jax.random.key(5), (2, G, T, D))


@functools.cache
def on_one_device(dispatch, factor, skip):
  layer = layer_of(GatingDropout(0.5, machines=4, replicas=2, skip_experts=skip), dispatch, factor, 0.3)
  call, state = grads_and_output(layer)
  call = jax.jit(call)
  return [jax.device_get(call(state, *inputs(), jax.random.key(i))) for i in KEYS]


@pytest.mark.parametrize("dispatch, factor, mesh, skip", [
    pytest.param("ragged", None, (2, 4, 1), False, marks=pytest.mark.slow),
    pytest.param("scatter", 1.0, (2, 2, 2), False, marks=pytest.mark.slow),
    pytest.param("ragged", 1.0, (1, 8, 1), False, marks=pytest.mark.slow),
    pytest.param("ragged", None, (2, 4, 1), True, marks=pytest.mark.slow)], ids=str)
def test_the_mesh_changes_nothing(dispatch, factor, mesh, skip):
  """Also on meshes that are not the config's machines, and whether tokens are kept local or not."""
  layer = layer_of(GatingDropout(0.5, machines=4, replicas=2, skip_experts=skip), dispatch, factor, 0.3)
  call, state = grads_and_output(layer)
  mesh = partitioning.make_mesh(*mesh)
  with partitioning.use(mesh):
    x, dy = jax.device_put(inputs(), partitioning.shardings((None, "batch"), mesh))
    call = jax.jit(call)
    got = [jax.device_get(call(state, x, dy, jax.random.key(i))) for i in KEYS]
  draws = [bool(layer.exchange.draw(jax.random.fold_in(jax.random.key(i), 2))) for i in KEYS]
  assert 0 < sum(draws) < len(draws)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(on_one_device(dispatch, factor, skip)), strict=True):
    np.testing.assert_allclose(a, b, **CLOSE)


def test_tokens_kept_local_go_to_experts_of_their_machine():
  """Groups 0-3 are replica 0's, one on each of four machines of two experts; so are groups 4-7."""
  layer = layer_of(GatingDropout(1.0, machines=4, replicas=2))
  routing = jax.jit(lambda x: layer(x, key=jax.random.key(0))[1].only_list())(inputs()[0])
  kept, expert = routing.kept, routing.expert
  np.testing.assert_array_equal(expert // 2, np.tile([0, 1, 2, 3], 2)[:, None] * np.ones((1, 2 * T)))
  assert kept.sum() == G * T  # one expert a token
  assert len(np.unique(expert)) == E


def computations(text):
  """Name -> body of each computation of a compiled program."""
  return dict(re.findall(r"^(?:ENTRY )?%?(\S+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("mesh, exchanged", [
    pytest.param((2, 4, 1), [False, True], marks=pytest.mark.slow), ((1, 8, 1), None)], ids=str)
def test_it_compiles_to_a_conditional_around_the_exchange(mesh, exchanged):
  """Where machines fit the mesh, all all-to-alls are in one branch of a conditional, none in the other."""
  call, state = grads_and_output(layer_of(GatingDropout(0.5, machines=4, replicas=2)))
  mesh = partitioning.make_mesh(*mesh)
  with partitioning.use(mesh):
    x, dy = jax.device_put(inputs(), partitioning.shardings((None, "batch"), mesh))
    text = jax.jit(call).lower(state, x, dy, jax.random.key(0)).compile().as_text()
  bodies = computations(text)
  holders = {name for name, body in bodies.items() if " all-to-all(" in body}
  branches = [(a, b) for a, b in re.findall(
      r"conditional\(.*?branch_computations=\{%?([\w.\-]+), %?([\w.\-]+)\}", text) + re.findall(
      r"conditional\(.*?true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)", text)]
  if exchanged is None:
    assert not branches and sum(body.count(" all-to-all(") for body in bodies.values()) == 4
    return
  with_exchange = [{name in holders for name in pair} for pair in branches]
  assert {True, False} in with_exchange and {True} not in with_exchange
  assert holders == {name for pair in branches for name in pair} & holders


def test_rate_zero_and_evaluation_are_the_plain_layer():
  call = lambda layer, key: jax.jit(lambda x: layer(x, key=key)[0])(inputs()[0])
  plain = call(layer_of(None), None)  # nothing in it draws: a key changes nothing
  for rate, key in ((0.0, jax.random.key(1)), (1.0, None)):
    np.testing.assert_array_equal(call(layer_of(GatingDropout(rate, machines=4)), key), plain)


def test_skipped_experts_give_zero():
  layer = layer_of(GatingDropout(1.0, machines=4, skip_experts=True))
  y, routing = jax.jit(lambda x: layer(x, key=jax.random.key(0)))(inputs()[0])
  assert not y.any() and not routing.kept.any()


@pytest.mark.parametrize("fields, message", [
    (dict(rate=1.5), "gating_dropout.rate=1.5 is no probability; choose 0 to 1"),
    (dict(rate=0.1, machines=3), "gating_dropout.machines=3 does not divide num_experts=8; choose a divisor"),
    (dict(rate=0.1, replicas=0), "gating_dropout.replicas=0 is out of range; choose 1 or more"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    layer_of(GatingDropout(**fields))


def test_a_router_whose_tokens_are_listed_unevenly_is_refused():
  router = make_router("expert_choice", D, E, rngs=nnx.Rngs(0))
  layer = MoELayer(router, Experts(E, D, F, rngs=nnx.Rngs(1)), exchange=GatingDropout(0.5, 4))
  with pytest.raises(UserError, match="lists every token equally often"):
    layer(inputs()[0], key=jax.random.key(0))
