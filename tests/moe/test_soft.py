"""Soft MoE: mixtures of tokens and of slots, as two numpy loops, on any mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, SoftMoELayer, Tokens
from sparse_experts.moe.mixtures.mixture import mixture_metrics
from tests import oracle

B, L, D, F, E = 8, 6, 8, 12, 4
CLOSE = dict(rtol=2e-5, atol=2e-5)  # float32, sums of tens of terms of order 1


def layer_of(slots=2, num_experts=E, dropout=0.0):
  experts = Experts(num_experts, D, F, "swiglu", init_scale=4.0, dropout=dropout, rngs=nnx.Rngs(1))
  layer = SoftMoELayer(D, experts, slots=slots, rngs=nnx.Rngs(0))
  layer.scale[...] = jnp.asarray(5.0)  # far from even
  return layer


def inputs():
  x_BLD = jax.random.normal(jax.random.key(5), (B, L, D))
  mask_BL = jnp.ones((B, L), bool).at[0, 2].set(False).at[1].set(False).at[3, 1:].set(False)
  return x_BLD.at[0, 2].set(jnp.nan), mask_BL


def arrays_of(layer, x_BLD):
  """Everything that y has a gradient by, in float64."""
  of = {"x": x_BLD, "phi": layer.phi[...], "scale": layer.scale[...]}
  of |= {name: getattr(layer.experts, name)[...] for name in ("w_in", "w_gate", "w_out")}
  return {name: np.asarray(a, np.float64) for name, a in of.items()}


def by_hand(arrays, mask_BL):
  return np.stack([row_by_hand(**arrays | {"x": x_LD}, mask=mask_L)
                   for x_LD, mask_L in zip(arrays["x"], mask_BL, strict=True)])


def row_by_hand(x, phi, scale, mask, **weights):
  """One row: logits, both softmaxes and sums as loops."""
  x_LD, mask_L = x, mask
  real = [t for t in range(len(mask_L)) if mask_L[t]]
  y = np.zeros(x_LD.shape)
  if not real:
    return y
  unit = lambda v: v / np.sqrt((v * v).sum() + 1e-6)
  logit = {(t, e, p): scale * unit(x_LD[t]) @ unit(phi[:, e, p])
           for t in real for e in range(phi.shape[1]) for p in range(phi.shape[2])}
  out = {}
  for _, e, p in logit:
    weight = oracle.softmax(np.array([logit[t, e, p] for t in real]))
    out[e, p] = oracle.expert(weight @ x_LD[real], weights, e, "swiglu")
  for t in real:
    weight = oracle.softmax(np.array([logit[t, e, p] for e, p in out]))
    y[t] = weight @ np.stack(list(out.values()))
  return y


@pytest.mark.parametrize("slots, num_experts", [(2, E), (1, 1)])
def test_it_equals_the_loops(slots, num_experts):
  """Padding, NaN in it too, weighs nothing and gets zero; so does a row of padding alone, not one token."""
  layer, (x_BLD, mask_BL) = layer_of(slots, num_experts), inputs()
  y_BLD, routing = jax.jit(lambda x: layer(x, Tokens(mask=mask_BL)))(x_BLD)
  np.testing.assert_allclose(y_BLD, by_hand(arrays_of(layer, x_BLD), np.asarray(mask_BL)), **CLOSE)
  load_E, tokens = routing.metrics["load"]
  np.testing.assert_allclose(load_E.sum(), tokens, rtol=1e-5)
  assert tokens == int(mask_BL.sum()) and routing.token is None


@pytest.mark.parametrize("slots, num_experts", [(2, E), (1, 1)])
def test_its_gradients_are_slopes_of_the_loops(slots, num_experts):
  """Along a random direction of each array, by central differences in float64; none into padding."""
  layer, (x_BLD, mask_BL) = layer_of(slots, num_experts), inputs()
  graphdef, state = nnx.split(layer)
  rng = np.random.default_rng(0)
  dy_BLD = rng.normal(size=x_BLD.shape)

  @jax.jit
  @jax.grad
  def gradient(layer_and_x):
    state, x_BLD = layer_and_x
    y_BLD, _ = nnx.merge(graphdef, state)(x_BLD, Tokens(mask=mask_BL))
    return (y_BLD * jnp.asarray(dy_BLD, jnp.float32)).sum()

  state, dx_BLD = gradient((state, x_BLD))
  assert not np.asarray(dx_BLD)[~np.asarray(mask_BL)].any()
  found, arrays = arrays_of(nnx.merge(graphdef, state), dx_BLD), arrays_of(layer, x_BLD)
  for name, a in arrays.items():
    way = rng.normal(size=a.shape)
    at = lambda step, name=name, a=a, way=way: (by_hand(
        arrays | {name: a + step * way}, np.asarray(mask_BL)) * dy_BLD).sum()
    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    # Float32 gradients: of the size of their terms, as these may cancel in the sum.
    np.testing.assert_allclose((found[name] * way).sum(), slope, rtol=1e-4, atol=1e-4 * np.abs(
        found[name] * way).max(), err_msg=name)


def test_metrics_by_hand():
  """Weights of two experts in two tokens; a third is padding, and may hold NaN."""
  weight_BLE = jnp.array([[[0.5, 0.5], [1.0, 0.0], [jnp.nan, jnp.nan]]])
  found = mixture_metrics(weight_BLE, jnp.array([[True, True, False]]))
  assert found["load"][0].tolist() == [1.5, 0.5]
  sums = {name: float(total) for name, (total, _) in found.items() if name != "load"}
  assert sums == pytest.approx({
      "experts_per_token": 4, "entropy": np.log(2), "confidence": 1.5, "dropped": 0, "token_dropped": 0})
  assert {int(count) for _, count in found.values()} == {2}


@pytest.mark.parametrize("num_experts, norm", [(4, 0.5), (16, 0.25)])
def test_slots_start_with_the_norm_of_the_authors_code(num_experts, norm):
  """1 / sqrt(E): their initializer counts the experts as inputs."""
  experts = Experts(num_experts, 512, 1, rngs=nnx.Rngs(1))
  phi_DEP = SoftMoELayer(512, experts, slots=3, rngs=nnx.Rngs(0)).phi[...]
  np.testing.assert_allclose(np.linalg.norm(phi_DEP, axis=0), norm, rtol=0.1)


def test_weights_sum_to_one():
  """Over tokens for each slot, over slots for each token; their scale knows directions only."""
  layer, (x_BLD, mask_BL) = layer_of(), inputs()
  x_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)
  dispatch, combine = layer.weights(x_BLD, mask_BL)
  real_B = np.asarray(mask_BL.any(-1))
  np.testing.assert_allclose(dispatch.sum(1)[real_B], 1, rtol=1e-5)
  np.testing.assert_allclose(combine.sum((2, 3))[mask_BL], 1, rtol=1e-5)
  assert not dispatch[~mask_BL].any() and not combine[~mask_BL].any()
  np.testing.assert_allclose(layer.weights(30 * x_BLD, mask_BL)[1], combine, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_a_mesh_gives_the_same_numbers_with_four_exchanges(mesh):
  """Value and every gradient, with dropout in the experts; no weight is gathered."""
  layer, (x_BLD, mask_BL) = layer_of(dropout=0.3), inputs()
  graphdef, state = nnx.split(layer)
  x_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)

  def objective(state, x_BLD, mask_BL):
    y_BLD, routing = nnx.merge(graphdef, state)(x_BLD, Tokens(mask=mask_BL), jax.random.key(3))
    return jnp.sin(y_BLD).sum(), (y_BLD, routing.metrics)

  call = jax.grad(objective, (0, 1), has_aux=True)
  expected = jax.jit(call)(state, x_BLD, mask_BL)
  mesh = partitioning.make_mesh(*mesh)
  with partitioning.use(mesh):
    put = lambda v: v.replace(jax.device_put(v[...], partitioning.shardings(v.axes, mesh)))
    placed = jax.tree.map(put, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    arguments = placed, *jax.device_put((x_BLD, mask_BL), partitioning.batch_sharding(mesh))
    program = jax.jit(call).lower(*arguments).compile()
    got = program(*arguments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, **CLOSE)
  text = program.as_text()
  assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 4
  assert not re.search(r" all-gather(?:-start)?\(", text)


def test_no_slots_are_refused():
  with pytest.raises(UserError, match="router.slots=0 leaves an expert nothing to do; choose 1 or more"):
    layer_of(slots=0)
