"""SMEAR: one merged expert per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, SmearLayer, Tokens

B, L, D, F, E = 8, 5, 6, 10, 4
CLOSE = dict(rtol=2e-5, atol=2e-5)  # float32, sums of tens of terms of order 1


def layer_of(expert_dropout=0.1, activation="swiglu"):
  experts = Experts(E, D, F, activation, init_scale=4.0, rngs=nnx.Rngs(1))
  layer = SmearLayer(D, experts, expert_dropout=expert_dropout, rngs=nnx.Rngs(0))
  layer.gain[...] = jnp.ones((D, 1))  # far from even
  return layer


def inputs():
  x_BLD = jax.random.normal(jax.random.key(5), (B, L, D))
  mask_BL = jnp.ones((B, L), bool).at[0, 2].set(False).at[1].set(False)
  return x_BLD.at[0, 2].set(jnp.nan), mask_BL


def expert(layer, x_BLD, e):
  w = {name: getattr(layer.experts, name)[...][e] for name in ("w_in", "w_gate", "w_out")}
  return (jax.nn.silu(x_BLD @ w["w_gate"]) * (x_BLD @ w["w_in"])) @ w["w_out"]


def test_one_hot_weights_are_that_expert():
  layer, (x_BLD, _) = layer_of(), inputs()
  for e in range(E):
    y_BLD = layer.merged(x_BLD, jnp.broadcast_to(jax.nn.one_hot(e, E), (B, E)))
    np.testing.assert_allclose(y_BLD, expert(layer, x_BLD, e), **CLOSE)


def test_the_merge_is_of_weights_and_the_weights_are_of_the_rows_mean():
  """By hand for a row with padding, which enters neither and gets zero; a row of padding is zero."""
  layer, (x_BLD, mask_BL) = layer_of(), inputs()
  y_BLD, routing = jax.jit(lambda x: layer(x, Tokens(mask=mask_BL)))(x_BLD)
  x, keep = np.asarray(x_BLD[0], np.float64), np.asarray(mask_BL[0])
  normed = lambda a: (a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5)
  array = lambda a: np.asarray(a[...], np.float64)
  logit = normed(x[keep].mean(0)) @ (normed(array(layer.w)) * array(layer.gain))
  p = np.exp(logit) / np.exp(logit).sum()
  merge = lambda name: np.einsum("e,edf->df", p, array(getattr(layer.experts, name)))
  w = {name: merge(name) for name in ("w_in", "w_gate", "w_out")}
  gate = x[keep] @ w["w_gate"]
  expected = (gate / (1 + np.exp(-gate)) * (x[keep] @ w["w_in"])) @ w["w_out"]
  np.testing.assert_allclose(y_BLD[0][keep], expected, **CLOSE)
  assert not y_BLD[0, 2].any() and not y_BLD[1].any()
  load_E, rows = routing.metrics["load"]
  assert rows == B - 1
  np.testing.assert_allclose(load_E.sum(), rows, rtol=1e-5)


def test_experts_that_are_one_linear_map_merge_to_the_mean_of_their_outputs():
  """relu of a positive input and a first matrix shared by all: what is left of an expert is its second."""
  layer = layer_of(activation="relu")
  w_in_EDF = jnp.abs(layer.experts.w_in[...])
  layer.experts.w_in[...] = jnp.broadcast_to(w_in_EDF[:1], w_in_EDF.shape)
  x_BLD = jnp.abs(inputs()[0][2:])
  weight_BE = jax.nn.softmax(jax.random.normal(jax.random.key(2), (B - 2, E)))
  outputs = [jax.nn.relu(x_BLD @ layer.experts.w_in[...][e]) @ layer.experts.w_out[...][e] for e in range(E)]
  ensemble = sum(weight_BE[:, e, None, None] * y for e, y in enumerate(outputs))
  np.testing.assert_allclose(layer.merged(x_BLD, weight_BE), ensemble, **CLOSE)


def test_expert_dropout():
  """Out with its probability, the rest scaled to 1; all out is all alike; not without a key."""
  prob_BE = jnp.broadcast_to(jnp.array([0.1, 0.2, 0.3, 0.4]), (4000, E))
  weight_BE = layer_of(expert_dropout=0.5).drop(prob_BE, jax.random.key(0))
  np.testing.assert_allclose(weight_BE.sum(-1), 1, rtol=1e-5)
  out_BE = np.asarray(weight_BE) < 1e-6
  np.testing.assert_allclose(out_BE.mean(0), 0.5 - 0.5**E, atol=0.03)  # 4 deviations of 4,000 draws
  alike = np.asarray(weight_BE == 0.25).all(-1)
  np.testing.assert_allclose(alike.mean(), 0.5**E, atol=0.02)
  layer, (x_BLD, mask_BL) = layer_of(), inputs()
  call = jax.jit(lambda key: layer(x_BLD, Tokens(mask=mask_BL), key)[0])
  assert not np.allclose(call(jax.random.key(0)), call(jax.random.key(1)))
  plain = lambda layer: layer(x_BLD, Tokens(mask=mask_BL))[0]
  np.testing.assert_array_equal(plain(layer_of(0.0)), plain(layer))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_a_mesh_gives_the_same_numbers(mesh):
  layer, (x_BLD, mask_BL) = layer_of(), inputs()
  graphdef, state = nnx.split(layer)
  x_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)
  dy_BLD = jax.random.normal(jax.random.key(4), x_BLD.shape)

  def objective(state, x_BLD):
    y_BLD, routing = nnx.merge(graphdef, state)(x_BLD, Tokens(mask=mask_BL), jax.random.key(3))
    return (y_BLD * dy_BLD).sum(), (y_BLD, routing.metrics)

  call = jax.grad(objective, (0, 1), has_aux=True)
  expected = jax.jit(call)(state, x_BLD)
  mesh = partitioning.make_mesh(*mesh)
  with partitioning.use(mesh):
    put = lambda v: v.replace(jax.device_put(v[...], partitioning.shardings(v.axes, mesh)))
    placed = jax.tree.map(put, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    got = jax.jit(call)(placed, jax.device_put(x_BLD, partitioning.batch_sharding(mesh)))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    # Of the largest entry: weights, outputs and gradients are each sums in another order.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_mistakes_are_named():
  with pytest.raises(UserError, match="router.expert_dropout=1.0 is out of range; choose from 0 to below 1"):
    layer_of(expert_dropout=1.0)
  with pytest.raises(UserError, match="model.expert_dropout=0.2 drops hidden units of single experts"):
    SmearLayer(D, Experts(E, D, F, dropout=0.2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
