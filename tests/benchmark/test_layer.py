"""The same functions on a few tokens: the products are there, the figures are what they are called."""

import contextlib
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import cli
from sparse_experts.benchmark import layer, timing
from sparse_experts.errors import UserError
from sparse_experts.moe import Experts
from tests.training.test_measures import undefined

TINY = layer.Workload(64, 16, 32, 4, 2, "swiglu", 1.25, group_size=32)
PER_DISPATCH = {
    f"{name}{quartiles}" for way in ("forward", "forward_backward") for quartiles in ("", "_quartiles")
    for name in (f"{way}_ms", f"floor_{way}_ms", f"{way}_over_floor")} | {
    "router_dispatch_ms", "router_dispatch_share", "tflops", "load_max_mean", "dropped", "rows_over_floor"}


@pytest.fixture(scope="module")
def printed():
  """What `benchmark layer --json` prints where the workload `switch` is a tiny one."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(layer.WORKLOADS, "switch", TINY)
    with contextlib.redirect_stdout(io.StringIO()) as out:
      assert cli.main(["benchmark", "layer", "--workload=switch", "--runs=3", "--json"]) == 0
  return out.getvalue()


@pytest.mark.slow
def test_json_is_the_last_line(printed):
  found = json.loads(printed.splitlines()[-1])
  assert found["jax"] == jax.__version__ and found["device"]
  (w,) = found["workloads"].values()
  assert (w["tokens"], w["runs"], w["dtype"]) == (64, 3, "float32")
  assert set(w["dispatches"]) == {"ragged", "scatter", "einsum"}
  for name, d in w["dispatches"].items():
    assert set(d) == PER_DISPATCH, name
    assert d["forward_over_floor"] > 0 and d["forward_ms_quartiles"][0] <= d["forward_ms"]
    assert d["load_max_mean"] >= 1 and 0 <= d["dropped"] < 1
  # int(1.25 * 32 * 2 / 4) = 20 slots of each expert for 16 rows on average.
  assert w["dispatches"]["scatter"]["rows_over_floor"] == 1.25
  assert w["dispatches"]["ragged"]["rows_over_floor"] == 1
  assert "fwd+bwd ms" in printed and "scatter" in printed
  shapes = {field.name for field in dataclasses.fields(TINY)} | {"runs", "dispatches"}
  assert not undefined({*w} - shapes | PER_DISPATCH)


def test_the_floor_has_all_products():
  """By hand, 2 per multiply-add: 128 rows through three matrices, and each product has two gradients."""
  assert TINY.flops == 2 * 128 * 3 * 16 * 32
  programs = layer.floor_programs(TINY, layer.make_experts(TINY))
  for way, times in (("forward", 1), ("forward_backward", 3)):
    flops = programs[way].compiled.cost_analysis()["flops"]
    assert times * TINY.flops <= flops < 1.2 * times * TINY.flops  # activations come on top


@pytest.mark.parametrize("spoil", ["unused gradient", "missing product", "few rows"])
def test_a_product_left_out_is_noticed(spoil):
  w = dataclasses.replace(TINY, activation="relu")
  graphdef, params = nnx.split(layer.make_experts(w))
  x_ECD, dy_ECD = jnp.ones((2, 4, 32, 16))
  batched = lambda x, p: nnx.merge(graphdef, p).batched(x)
  if spoil == "missing product":
    spoilt, flops = timing.Program(lambda x, p: x @ p["w_in"][...], (x_ECD, params)), w.flops
  elif spoil == "few rows":
    spoilt, flops = timing.Program(batched, (x_ECD[:, :28], params)), w.flops
  else:
    gradient = lambda dy, x, p: jax.vjp(batched, x, p)[1](dy)[1]
    spoilt, flops = timing.Program(gradient, (dy_ECD, x_ECD, params)), 3 * w.flops
  with pytest.raises(UserError, match="left a part out"):
    layer.check_products(spoilt.compiled, flops, 2)


def test_gradients_are_of_the_output_and_of_the_losses():
  """And of the router, the experts and the input, as a train step takes them."""
  experts, x_GTD = layer.make_experts(TINY), layer.inputs(TINY)
  made = layer.make_layer(TINY, experts, "ragged")
  (y, loss), _, (dx, dparams) = layer.layer_programs(made, x_GTD)["forward_backward"]()
  graphdef, params, rest = nnx.split(made, nnx.Param, ...)

  def objective(x, params):
    y, routing = nnx.merge(graphdef, params, rest)(x)
    total, count = routing.losses["load_balance"]
    return 0.5 * (y.sum() + 0.01 * total / count)

  wanted = jax.jit(jax.grad(objective, (0, 1)))(x_GTD, params)
  assert y.shape == x_GTD.shape and loss > 0
  for a, b in zip(jax.tree.leaves((dx, dparams)), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)  # float32, sums of at most 128 terms
  assert np.abs(dparams["router"]["w"][...]).max() > 0


@pytest.mark.slow
def test_experts_without_products_leave_the_moves():
  """Top-1 with identity experts and no drops: every token comes back, times its gate."""
  w = dataclasses.replace(TINY, k=1, capacity_factor=None)
  for dispatch in ("ragged", "scatter", "einsum"):
    x_GTD = layer.inputs(w)
    made = layer.make_layer(w, layer.Identity(w.num_experts), dispatch)
    y_GTD, routing = made(x_GTD)
    gate_GT = jnp.take_along_axis(routing.gate, jnp.argsort(routing.token, axis=-1), axis=-1)
    np.testing.assert_allclose(y_GTD, x_GTD * gate_GT[..., None], rtol=1e-6)


def test_memory_by_hand():
  """Two matrices that are multiplied: 3 arrays are held, and no others."""
  w = dataclasses.replace(TINY, k=1)
  x, p = jnp.ones((64, 16)), jnp.ones((16, 16))
  program = timing.Program(lambda dy, x, p: x @ p + dy, (x, x, p))
  found = layer.memory(w, program)
  held = (64 * 16 * 3 + 16 * 16) * 4 / 2**20
  assert held <= found["memory_mib"] < 1.5 * held
  assert found["memory_least_mib"] == (2 * (64 * 16 + 16 * 16) + 64 * 16) * 4 / 2**20


def test_rounds_are_interleaved_and_turn_around(monkeypatch):
  order = []
  programs = {name: lambda name=name: order.append(name) for name in "abc"}
  times = timing.interleave(programs, 3)
  assert "".join(order) == "abc" + "abc" + "cba" + "abc"
  assert {len(sample.values) for sample in times.values()} == {3}
  slow, fast = timing.Sample(np.array([2.0, 9.0, 4.0])), timing.Sample(np.array([1.0, 3.0, 4.0]))
  assert slow.median == 4 and slow.over(fast).median == 2 and slow.minus(fast).median == 1
  assert slow.quartiles == [3.0, 6.5]


def test_every_workload_can_be_made():
  for w in layer.WORKLOADS.values():
    assert w.rows % w.num_experts == 0 and w.tokens % (w.group_size or w.tokens) == 0
    shape = jax.eval_shape(lambda w=w: nnx.split(Experts(
        w.num_experts, w.embed_dim, w.expert_dim, w.activation, rngs=nnx.Rngs(0)))[1])
    assert sum(a.size for a in jax.tree.leaves(shape)) == (
        w.num_experts * w.products * w.embed_dim * w.expert_dim)
