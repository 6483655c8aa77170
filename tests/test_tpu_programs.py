"""What a TPU would be given, compiled without one; skipped without libtpu (`pip install -e '.[aot]'`)."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")

# A dropless layer with its gradient, rows in bfloat16, on each mesh: {collective: {type of elements: count}}.
CODE = r"""
import collections, json, re
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from sparse_experts import partitioning
from sparse_experts.moe import Experts, MoELayer, Tokens, TopKRouter

def compiled(mesh, backend=None, E=8, D=128, G=16, T=64):
  def layer():
    experts = Experts(E, D, 2 * D, "swiglu", backend=backend, rngs=nnx.Rngs(1))
    return MoELayer(TopKRouter(D, E, 2, rngs=nnx.Rngs(0)), experts, "ragged", T, exchange_rows_factor=2.0)

  graphdef, state = nnx.eval_shape(lambda: nnx.split(layer()))
  put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  state = jax.tree.map(lambda v: v.replace(put(v, partitioning.shardings(v.axes, mesh))), state,
                       is_leaf=lambda v: isinstance(v, nnx.Variable))
  x = put(jnp.zeros((G, T, D), jnp.bfloat16), partitioning.batch_sharding(mesh))

  def loss(state, x, dy):
    y, routing = nnx.merge(graphdef, state)(x)
    return (y * dy).sum(dtype=jnp.float32), (y, routing.kept)

  with partitioning.use(mesh), jax.default_device(mesh.devices.flat[0]):
    text = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(state, x, x).compile().as_text()
  found = collections.defaultdict(collections.Counter, kernels={"tpu": text.count('"tpu_custom_call"')})
  ops = "(ragged-all-to-all|all-to-all|all-gather|all-reduce|send)"
  for kind, op in re.findall(rf"= \(*(\w+)\[.*? {ops}(?:-start)?\(", text):
    found[op][kind] += 1
  return found

def draws(mesh, **noise):
  # Passes over [G, T, D] that draw numbers: in the scores of a router, and with their gradients.
  x = jax.ShapeDtypeStruct((4, 256, 128), jnp.bfloat16, sharding=partitioning.batch_sharding(mesh))
  make = lambda: nnx.split(TopKRouter(128, 8, **noise, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.eval_shape(make)
  replicated = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=partitioning.replicated(mesh))
  state, key = jax.tree.map(replicated, (state, jax.eval_shape(lambda: jax.random.key(0))))

  def loss(state, x, key):
    tokens = Tokens(mask=jnp.ones(x.shape[:2], bool))
    return nnx.merge(graphdef, state)(x, tokens, None, key).gate.sum()

  def count(function):
    with partitioning.use(mesh):
      text = jax.jit(function).lower(state, x, key).compile().as_text()
    return len(re.findall(r"= u32\[4,256,128\]\S* xor\(", text)) / 21  # of a threefry

  return [count(loss), count(jax.grad(loss, (0, 1)))]

devices = lambda n: topologies.get_topology_desc("v5e:2x4", "tpu", num_slices=n).devices
print(json.dumps({
    "one chip": compiled(partitioning.make_mesh(1, 1, 1, devices(1)[:1]), "tokamax"),
    "kernels": compiled(partitioning.make_mesh(2, 2, 2, devices(1)), "tokamax", D=512, G=64),
    "jitter": draws(partitioning.make_mesh(1, 1, 1, devices(1)[:1]), jitter=0.1),
    "dropout": draws(partitioning.make_mesh(1, 1, 1, devices(1)[:1]), input_dropout=0.1),
    "one slice": compiled(partitioning.make_mesh(2, 2, 2, devices(1))),
    "two slices": compiled(partitioning.make_mesh(4, 4, 1, devices(2), dcn={"data": 2}))}))
"""


@functools.cache
def programs():
  env = os.environ | dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5p-8",
                          TPU_WORKER_HOSTNAMES="localhost", JAX_NUM_CPU_DEVICES="1",
                          ALLOW_MULTIPLE_LIBTPU_LOAD="1")  # no TPU is touched
  done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_layer_makes_four_ragged_exchanges():
  """Two there and back, two of their gradients, all of them bfloat16, as are the sums over `model`."""
  found = programs()["one slice"]
  assert found["ragged-all-to-all"] == {"bf16": 4} and "all-to-all" not in found
  assert found["all-reduce"]["bf16"] in (1, 2)  # the compiler may put both into one
  # Sizes of all: the compiler may make their gather a sum.
  assert found.get("all-gather", {}).get("s32", 0) + found["all-reduce"].get("s32", 0) == 1


def test_between_slices_travel_sums_of_gradients_and_a_number_of_rounds():
  """Room for half of the worst case: loops of further rounds make two exchanges forward and three backward.

  How many rounds there are, one number, the devices of all slices agree on.
  """
  found = programs()["two slices"]
  assert found["ragged-all-to-all"] == {"bf16": 4 + 2 + 3}
  assert set(found["send"]) == {"f32", "s32"} and found["send"]["s32"] == 1


@pytest.mark.parametrize("name", ["one chip", "kernels"])
def test_the_kernel_for_grouped_products_is_compiled(name):
  """Three products of a gated FFN, and two gradients of each; on one device and on a mesh."""
  assert programs()[name]["kernels"]["tpu"] == 9


@pytest.mark.parametrize("noise", ["jitter", "dropout"])
def test_noise_of_a_routers_input_is_drawn_once(noise):
  """A fusion would draw it again in each product that reads the noisy input."""
  assert programs()[noise] == [1, 1]
