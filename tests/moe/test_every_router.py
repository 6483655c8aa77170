"""What holds for every router, whatever it does: one line each in ROUTERS."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import moe, partitioning
from sparse_experts.config import default_config
from sparse_experts.models import build
from sparse_experts.moe import Experts, MoELayer, Tokens, check_router, make_router
from sparse_experts.validation import validate

G, T, D, F, E = 8, 16, 6, 5, 4
CLOSE = dict(rtol=2e-5, atol=2e-5)  # float32, sums of at most a hundred terms of order 1

# (name, arguments): a router may stand here in several variants.
ROUTERS = [
    ("top_k", dict()),
    ("top_k", dict(k=2, gate="renormalized", order="token", balance_count="multi_hot")),
    ("top_k", dict(k=2, gate="renormalized_after_drops", order="batch_priority")),
    ("expert_choice", dict(k=2)),
    ("expert_choice", dict(token_cap=1, z_weight=0.5)),
    ("hash", dict(assign="balanced", counts=range(200, 0, -1))),
    ("hash", dict(k=2)),
    ("random", dict()),
    ("random", dict(draw="token", eval_draw="sequence")),
    ("task", dict()),
    ("noisy_top_k", dict(k=2)),
    ("hierarchical", dict(k=4, branches=2, branches_per_token=2)),
    ("v_moe", dict(k=2, order="batch_priority")),
    ("limoe", dict(min_experts=1.0)),
    ("deepseek_moe", dict(k=2, devices=2)),
    ("deepseek_v3", dict(k=2, nodes=2)),
    ("cosine", dict(k=2)),
    ("cosine", dict(gate_function="sigmoid", dim=3)),
    ("base", dict()),
    ("sinkhorn", dict(temperature=0.5)),
    ("dynmoe", dict(initial_experts=3, scale=10.0, train_scale=True, count_gradient="held")),
    ("no_token_left_behind", dict(choices=2)),
    ("reinforce", dict()),
    ("dselect_k", dict(k=2)),
    ("dselect_k", dict(k=1, per_example=False, gamma=4.0)),
    ("comet", dict(k=2, gamma=4.0)),
    ("top_p", dict(threshold=0.7)),
    ("sparse_mixer", dict(k=2, eps=0.5)),
    ("sigma_moe", dict(k=2, selection_dropout=0.3)),
    ("quantile", dict(k=2)),
    ("quantile", dict(k=2, score="logit", estimator="exact")),
    ("expert_threshold", dict()),
    ("expert_threshold", dict(warmup_steps=0)),
    ("expert_threshold", dict(warmup_steps=0, slack=4.0)),
    ("token_rounding", dict(k=2, tile=2)),
    ("simbal", dict(k=2, gate="renormalized")),
    ("permuted", dict(of="comet", k=2)),
    ("permuted", dict(of="deepseek_v3", k=2)),
    ("frozen", dict(of="deepseek_v3", k=2)),
]
# Experts, of which a token must leave some; fewer are refused.
FEWEST = {"quantile": 2}
every_router = pytest.mark.parametrize("name, arguments", ROUTERS, ids=str)
# Further variants of a router are slow.
FIRST = [name not in [before for before, _ in ROUTERS[:i]] for i, (name, _) in enumerate(ROUTERS)]
every_name = pytest.mark.parametrize("name, arguments", [
    pytest.param(*router, marks=[pytest.mark.slow] * (not first))
    for router, first in zip(ROUTERS, FIRST, strict=True)], ids=str)
# One of each kind of list: token choice, expert choice, a function of ids, another's.
KINDS = ("top_k", "expert_choice", "hash", "permuted")
one_of_each_kind = pytest.mark.parametrize("name, arguments", [
    pytest.param(*router, marks=[pytest.mark.slow] * (not first or router[0] not in KINDS))
    for router, first in zip(ROUTERS, FIRST, strict=True)], ids=str)


def router_of(name, arguments, num_experts=E):
  router = make_router(name, D, num_experts, rngs=nnx.Rngs(params=0), **arguments)
  # Wide enough that nothing ties, and that routers that start even do not.
  graphdef, params, rest = nnx.split(router, nnx.Param, ...)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves)) if leaves else []
  params = jax.tree.unflatten(tree, [
      jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)])
  return nnx.merge(graphdef, params, rest)


def layer_of(router, dispatch, factor):
  experts = Experts(router.num_experts, D, F, "gelu", init_scale=4.0, rngs=nnx.Rngs(2))
  return MoELayer(router, experts, dispatch, capacity_factor=factor, capacity_rule="megablocks")


def inputs(groups=G, length=T):
  rng = np.random.default_rng(0)
  x_GTD, dy_GTD = rng.normal(size=(2, groups, length, D)).astype(np.float32)
  mask_GT = np.ones((groups, length), bool)
  mask_GT[1 % groups, length // 2:] = mask_GT[0, length // 3] = False
  mask_GT[2 % groups] = groups < 3
  sequence_GT = np.arange(groups * length).reshape(groups, length) * 2 // length
  return x_GTD, dy_GTD, Tokens(
      mask=jnp.asarray(mask_GT), id=jnp.asarray(rng.integers(3, 200, (groups, length)), jnp.int32),
      sequence=jnp.asarray(sequence_GT, jnp.int32), task=jnp.asarray(sequence_GT % 3, jnp.int32))


def dense(layer, x_GTD, tokens):
  """y of the layer's own list with no dispatch: every expert runs on every token."""
  x_GTD = jnp.where(tokens.mask[..., None], x_GTD, 0)
  capacity = layer.capacity(x_GTD.shape[1])
  routing = layer.router(x_GTD, tokens, capacity, None)
  taken_GA = routing.valid
  if capacity is not None:
    taken_GA &= moe.routing.slots(routing.expert, routing.valid, layer.router.num_experts) < capacity
  gate_GA = jnp.where(taken_GA, routing.gate, 0)
  groups, length, _ = x_GTD.shape
  flat = x_GTD.reshape(1, groups * length, D)
  every = layer.experts.batched(jnp.broadcast_to(flat, (layer.router.num_experts, *flat.shape[1:])))
  y_EGTD = every.reshape(layer.router.num_experts, groups, length, D)
  group_G1 = jnp.arange(groups)[:, None]
  rows_GAD = y_EGTD[routing.expert, group_G1, routing.token] * gate_GA[..., None]
  return jnp.zeros_like(x_GTD).at[group_G1, routing.token].add(rows_GAD), routing


def value_and_gradients(layer, call, x_GTD, dy_GTD, tokens, compiled=True):
  """The reference runs op by op: its ops are those of all routers, so each is compiled once."""
  graphdef, state = nnx.split(layer)

  def objective(state, x_GTD):
    y_GTD, routing = call(nnx.merge(graphdef, state), x_GTD, tokens)
    losses = sum(moe.routing.as_pair(routing.losses[name])[0] for name in layer.router.loss_weights)
    return (y_GTD * dy_GTD).sum() + losses, (y_GTD, routing)

  found = jax.grad(objective, (0, 1), has_aux=True, allow_int=True)
  if compiled:
    found = jax.jit(found, compiler_options={"xla_backend_optimization_level": 0})
  grads, (y_GTD, routing) = found(state, x_GTD)
  real = [g for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0]
  return y_GTD, routing, real


@every_name
def test_it_keeps_its_promises(name, arguments):
  check_router(make_router(name, D, E, rngs=nnx.Rngs(params=0), **arguments), D)


@one_of_each_kind
@pytest.mark.parametrize("dispatch, factor", [
    pytest.param("ragged", None, marks=pytest.mark.slow), ("scatter", 0.8)], ids=str)
def test_a_dispatch_is_the_dense_reference(name, arguments, dispatch, factor):
  """Value, gradients of x, router and experts, and what is kept.

  With one dropless and one with capacity: that all dispatches treat a list alike, test_oracle.py shows.
  """
  layer, given = layer_of(router_of(name, arguments), dispatch, factor), inputs()
  expected_y, _, expected = value_and_gradients(layer, dense, *given, compiled=False)
  y_GTD, routing, grads = value_and_gradients(layer, lambda layer, x, tokens: layer(x, tokens), *given)
  np.testing.assert_allclose(y_GTD, expected_y, **CLOSE)
  for a, b in zip(grads, expected, strict=True):
    np.testing.assert_allclose(a, b, **CLOSE)
  assert not (routing.kept & ~routing.valid).any()
  np.testing.assert_allclose(routing.metrics["dropped"][1], routing.valid.sum())
  assert not routing.losses.keys() & routing.metrics.keys(), "a log has one place for both"
  assert not np.asarray(y_GTD)[~np.asarray(given[2].mask)].any()


@pytest.mark.slow
@every_router
def test_a_mesh_gives_the_same_numbers(name, arguments):
  """Groups over two devices, experts over four; with a key, so noise and training's ways too."""
  router, (x_GTD, _, tokens) = router_of(name, arguments), inputs()
  layer = layer_of(router, "ragged", 0.8)
  graphdef, state = nnx.split(layer)
  call = lambda state, x_GTD, tokens: nnx.merge(graphdef, state)(x_GTD, tokens, jax.random.key(3))
  one, routing = jax.jit(call)(state, x_GTD, tokens)
  mesh = partitioning.make_mesh(2, 4)
  with partitioning.use(mesh):
    other, spread = jax.jit(call)(state, *jax.device_put((x_GTD, tokens), partitioning.batch_sharding(mesh)))
  np.testing.assert_allclose(other, one, **CLOSE)
  np.testing.assert_array_equal(spread.expert, routing.expert)
  for kind in ("losses", "metrics"):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE),
                 getattr(spread, kind), getattr(routing, kind))


@pytest.mark.slow
@every_router
@pytest.mark.parametrize("groups, length, experts, factor", [(2, 5, 1, None), (2, 2, 4, 0.01)], ids=str)
def test_odd_sizes(name, arguments, groups, length, experts, factor):
  """One expert without bound; fewer tokens than experts, and hardly a slot."""
  experts = max(experts, FEWEST.get(name, 1))
  bounded = ("k", "nodes", "devices", "branches", "branches_per_token", "initial_experts")
  most = experts - FEWEST.get(name, 1) + 1
  arguments = arguments | {n: min(arguments[n], most) for n in bounded if n in arguments}
  router, given = router_of(name, arguments, experts), inputs(groups, length)
  layer = layer_of(router, "ragged", factor)
  y_GTD, routing, grads = value_and_gradients(layer, lambda layer, x, tokens: layer(x, tokens), *given)
  told = jax.tree.leaves((routing.losses, routing.metrics))
  assert all(np.isfinite(a).all() for a in [y_GTD, *grads, *told])


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in ROUTERS))
def test_a_config_line_names_it(name):
  """In the encoder of an encoder-decoder, which may see the future; a decoder takes causal ones only."""
  config = default_config().unlock()
  config.model.update(dict(name="seq2seq", num_layers=1, moe_every=1, group_size=32, embed_dim=16))
  config.data.update(dict(objective="span_corruption", length=32))
  config.model.router.name, config.model.decoder.router.name = name, "top_k"
  validate(config)
  model = build(config, 40)
  assert type(model.sparse_layers["encoder/00"].router) is moe.ROUTERS[name]


def test_who_looks_ahead_says_that_a_causal_decoder_refuses_it():
  for name, cls in (moe.ROUTERS | moe.LAYERS).items():
    made = cls if name in moe.LAYERS else make_router(name, 8, 8, rngs=nnx.Rngs(params=0))
    says = re.search(r"causal\s+decoder\s+refuses", inspect.getdoc(cls))
    assert says or made.causality in ("self", "past"), name


def test_the_table_has_every_router():
  assert {name for name, _ in ROUTERS} == set(moe.ROUTERS)
