"""The same numbers on every mesh, and only the collectives that must be there."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.moe import Experts, MoELayer, Router, Routing, TopKRouter, router_metrics
from sparse_experts.moe.experts import Dropout
from sparse_experts.moe.parallel import ExchangedExperts, all_to_all
from sparse_experts.moe.parallel.experts import pack

G, T, D, F, E = 8, 12, 8, 16, 8
MESHES = {"1x8": (1, 8, 1), "2x4": (2, 4, 1), "8x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x4x2": (1, 4, 2)}
DISPATCHES = {"einsum": 1.0, "scatter": 1.0, "ragged": 1.0, "dropless": None}


def assert_close(got, expected):
  """To 2e-6 of the largest entry: float32 sums of a few hundred terms, taken in another order."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())



class ExpertsChoose(Router):
  """Each expert takes its two best tokens: a list in which a token appears any number of times."""

  def __init__(self, d, num_experts, *, rngs):
    self.num_experts = num_experts
    self.w = nnx.Param(jax.random.normal(rngs.params(), (d, num_experts)), axes=("embed", "router"))

  def __call__(self, x_GTD, tokens, capacity, key=None):
    prob_GET = jax.nn.softmax(jnp.einsum("gtd,de->gte", x_GTD, self.w[...])).swapaxes(1, 2)
    token_GEC = jnp.argsort(-prob_GET, axis=-1)[..., :2]
    gate_GEC = jnp.take_along_axis(prob_GET, token_GEC, axis=-1)
    expert_GEC = jnp.broadcast_to(jnp.arange(self.num_experts)[:, None], token_GEC.shape)
    flat = lambda a: a.reshape(a.shape[0], -1)
    expert_GA, valid_GA = flat(expert_GEC), flat(gate_GEC > 0)
    return Routing(flat(token_GEC), expert_GA, flat(gate_GEC), valid_GA, metrics=router_metrics(
        expert_GA, valid_GA, prob_GET.swapaxes(1, 2), tokens.mask, self.num_experts))


def make_layer(dispatch, router="top_k", dropout=False, backend=None):
  if router != "experts_choose":
    gate, order = ("renormalized_after_drops", "batch_priority") if router == "after_drops" else (
        "renormalized", "choice")
    router = TopKRouter(D, E, 2, gate=gate, order=order, rngs=nnx.Rngs(0))
    router.w[...] *= 50
  else:
    router = ExpertsChoose(D, E, rngs=nnx.Rngs(0))
  experts = Experts(E, D, F, "swiglu", dropout=0.5 * dropout, init_scale=4.0, backend=backend,
                    rngs=nnx.Rngs(1))
  name = "ragged" if dispatch == "dropless" else dispatch
  return MoELayer(router, experts, name, T, DISPATCHES[dispatch], min_capacity=1)


def placed(state, x, mesh):
  """The layer's weights and a batch where training holds them."""
  put = lambda v: v.replace(jax.device_put(v[...], partitioning.shardings(v.axes, mesh)))
  is_variable = lambda v: isinstance(v, nnx.Variable)
  return jax.tree.map(put, state, is_leaf=is_variable), jax.device_put(x, partitioning.batch_sharding(mesh))


def lowered(layer, mesh, groups=G, backward=True, dtype=jnp.float32):
  """The layer on the mesh with its gradient, or forward only, and its arguments."""
  key = jax.random.key(7) if layer.experts.dropout else None
  graphdef, state = nnx.split(layer)
  x = jax.random.normal(jax.random.key(5), (groups, T, D), dtype)

  def forward(state, x, dy):
    y, routing = nnx.merge(graphdef, state)(x, key=key)
    return (y * dy).sum(dtype=jnp.float32), (y, routing.kept)

  function = jax.grad(forward, argnums=(0, 1), has_aux=True) if backward else lambda *a: forward(*a)[1]
  with partitioning.use(mesh):
    state, x = placed(state, x, mesh) if groups == G else (state, x)
    return jax.jit(function).lower(state, x, x), (state, x, x)


def compiled(*args, **kwargs):
  program, arguments = lowered(*args, **kwargs)
  return program.compile(), arguments


@functools.cache
def on_one_device(dispatch, router, dropout):
  program, arguments = compiled(make_layer(dispatch, router, dropout), partitioning.make_mesh())
  return jax.device_get(program(*arguments))


def collectives(program):
  names = r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
  return dict(collections.Counter(re.findall(names, program.as_text())))


# Dispatches x meshes; dropout where rows cross both axes, as its draws compile slowly.
CASES = [(d, m, "top_k", m == "2x2x2") for d in ("scatter", "dropless") for m in MESHES]
CASES += [(d, m, "top_k", False) for d in ("einsum", "ragged") for m in ("2x4", "2x2x2")]
CASES += [("ragged", "2x4", "experts_choose", False), ("scatter", "2x2x2", "experts_choose", False)]
CASES += [("scatter", "2x4", "after_drops", False)]
_FAST = {(d, m) for d in ("scatter", "dropless") for m in ("2x4", "2x2x2")} | {("einsum", "2x4")}


@pytest.mark.parametrize("dispatch, mesh_name, router, dropout", [
    pytest.param(*case, marks=[pytest.mark.slow] * (case[:2] not in _FAST)) for case in CASES])
def test_numbers_and_collectives(dispatch, mesh_name, router, dropout):
  """Output, drops and every gradient equal one device's; collectives as promised."""
  mesh = partitioning.make_mesh(*MESHES[mesh_name])
  program, arguments = compiled(make_layer(dispatch, router, dropout), mesh)
  assert_close(jax.device_get(program(*arguments)), on_one_device(dispatch, router, dropout))

  exchanged, split = mesh.shape["expert"] > 1, mesh.shape["model"] > 1
  found = collectives(program)
  reductions = found.pop("all-reduce")
  assert found == expected_exchanges(mesh, dispatch, backward=True)
  # One of expert weights over data, one of the router's over data and expert (one and the same where
  # those are the same devices), one each way over model.
  assert reductions <= (mesh.shape["data"] > 1 and exchanged) + 1 + 2 * split
  for gathered in re.findall(r"= (\S+) all-gather", program.as_text()):
    assert gathered.startswith(f"s32[{mesh.shape['expert']},"), "only the sizes are gathered"


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", ["8x1", "2x4", "2x2x2"])
def test_kernels_that_do_not_name_mesh_axes_change_no_number(mesh_name):
  """Tokamax (what it has for CPUs): `shard_map` takes its results without asking what they vary over."""
  program, arguments = compiled(make_layer("dropless", backend="tokamax"),
                                partitioning.make_mesh(*MESHES[mesh_name]))
  assert_close(jax.device_get(program(*arguments)), on_one_device("dropless", "top_k", False))


def expected_exchanges(mesh, dispatch, backward):
  if mesh.shape["expert"] == 1:
    return {}
  sizes = {"all-gather": 1} if dispatch in ("ragged", "dropless") else {}
  return {"all-to-all": 4 if backward else 2} | sizes


@pytest.mark.parametrize(
    "dispatch, mesh_name", [("scatter", "2x2x2"), ("dropless", "2x4"), ("dropless", "1x4x2")])
def test_collectives_forward(dispatch, mesh_name):
  mesh = partitioning.make_mesh(*MESHES[mesh_name])
  program, _ = compiled(make_layer(dispatch), mesh, backward=False)
  split = {"all-reduce": 1} if mesh.shape["model"] > 1 else {}
  assert collectives(program) == expected_exchanges(mesh, dispatch, backward=False) | split


@pytest.mark.parametrize("dispatch, mesh_name", [
    ("dropless", "1x8"), ("dropless", "2x4"), ("dropless", "2x2x2"), ("scatter", "2x2x2")])
def test_bfloat16_rows_travel_as_bfloat16(dispatch, mesh_name):
  """Rows there and back, their gradients and seeds, and what is summed over model; sizes are whole numbers.

  Gradients of weights are summed in float32, in which weights are kept. What the compiler adds outside
  `shard_map` is not in this text.
  """
  layer = make_layer(dispatch, dropout=mesh_name != "2x2x2")  # seeds travel too
  program, _ = lowered(layer, partitioning.make_mesh(*MESHES[mesh_name]), dtype=jnp.bfloat16)
  found, split = wires(program.as_text()), MESHES[mesh_name][2] > 1
  assert found.pop(("all_to_all", "bf16")) == 4
  assert found.pop(("all_reduce", "bf16"), 0) == 2 * split
  assert found.pop(("all_gather", "i32"), 0) == (dispatch == "dropless")
  assert set(found) <= {("all_reduce", "f32")} and found.total() == 3 * (MESHES[mesh_name][0] > 1)


def wires(text):
  """{(collective, element type of what it is given): count} of a lowered program."""
  # A reduction's type stands after its body.
  ops = re.findall(r'"stablehlo\.(all_to_all|all_gather|all_reduce|collective_\w+|reduce_scatter)"'
                   r'.*?: \(tensor<[\dx]*([a-z]+\d+)>\) ->', text, re.DOTALL)
  return collections.Counter(ops)


def test_router_is_float32_where_rows_are_bfloat16():
  """Gates are those of a float32 product; a bfloat16 one would be off by 1e-3."""
  layer = make_layer("dropless")
  x = jax.random.normal(jax.random.key(5), (G, T, D), jnp.bfloat16)
  with partitioning.use(partitioning.make_mesh(2, 4)):
    y, routing = jax.jit(layer)(x)
  logit = jnp.einsum("gtd,de->gte", x.astype(jnp.float32), layer.router.w[...], precision="highest")
  gate_GTK = jax.lax.top_k(jax.nn.softmax(logit), 2)[0]
  gate_GTK /= gate_GTK.sum(-1, keepdims=True)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(routing.gate, gate_GTK.swapaxes(1, 2).reshape(G, -1), atol=1e-5)


def emulated(operand, output, start, size, target, arriving, *, axis_name):
  """`jax.lax.ragged_all_to_all`, which XLA lacks on CPU, by gathering everything; NaN if sizes disagree."""
  n, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  share = size.shape[0] // n
  all_of = lambda a: jax.lax.all_gather(a, axis_name)
  mine = lambda a: jax.lax.dynamic_slice_in_dim(all_of(a).reshape(n, n, share), me, 1, 1).reshape(-1)
  rows, start, size, target = all_of(operand), mine(start), mine(size), mine(target)
  place_M1 = jnp.arange(output.shape[0])[:, None]
  here = (place_M1 >= target[None]) & (place_M1 < (target + size)[None])  # by place and run
  run = here.argmax(1)
  sent = rows.at[run // share, start[run] + place_M1[:, 0] - target[run]].get(mode="clip")
  output = jnp.where(here.any(1)[:, None], sent, output)
  return jnp.where((size == arriving).all(), output, jnp.asarray(jnp.nan, output.dtype))


@pytest.fixture
def ragged(monkeypatch):
  """The exchange of platforms that have it."""
  monkeypatch.setitem(all_to_all.EXCHANGES, "cpu", all_to_all.RAGGED)
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)


@pytest.mark.parametrize("dispatch, mesh_name, router, dropout", [
    ("dropless", "1x8", "top_k", False), ("dropless", "1x4x2", "top_k", False),
    ("ragged", "2x4", "experts_choose", False)])
def test_ragged_exchange(ragged, dispatch, mesh_name, router, dropout):
  """Output and every gradient equal one device's, as those of the padded exchange do."""
  layer, mesh = make_layer(dispatch, router, dropout), partitioning.make_mesh(*MESHES[mesh_name])
  program, arguments = compiled(layer, mesh)
  assert_close(jax.device_get(program(*arguments)), on_one_device(dispatch, router, dropout))


@pytest.mark.parametrize("dispatch", ["scatter", "dropless"])
def test_groups_that_do_not_divide_are_padded(dispatch):
  """Evaluation and sampling may have any number of groups."""
  layer = make_layer(dispatch)
  alone, arguments = compiled(layer, partitioning.make_mesh(), groups=3)
  spread, _ = compiled(layer, partitioning.make_mesh(2, 4), groups=3)
  assert_close(jax.device_get(spread(*arguments)), jax.device_get(alone(*arguments)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_seeds_travel_exactly(dtype):
  seed_R = jnp.array([0, 255, 65_537, 2**32 - 1], jnp.uint32)
  exchange = ExchangedExperts(make_layer("ragged").experts, {}, None)
  dropout = Dropout(jax.random.key(0), seed_R)
  x_RD, found = exchange._unpack(pack(jnp.ones((4, D), dtype), dropout), D, dropout)
  np.testing.assert_array_equal(found.seed, seed_R)
  assert x_RD.shape == (4, D) and (x_RD == 1).all()
