"""Every router convention x dispatch equals two Python loops, in value and gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.moe import DISPATCHES, Experts, MoELayer, Tokens, TopKRouter
from tests import oracle

G, T, D, F, E = 3, 10, 5, 7, 4
# float32 against float64 over sums of at most a hundred terms of order 1.
CLOSE = dict(rtol=2e-5, atol=2e-5)
BALANCE_WEIGHT, Z_WEIGHT = 0.7, 0.3  # large, so that a wrong loss shows in the gradient

# k, gate, order, balance_count, activation, capacity factor (rule: megablocks, k counts)
CONVENTIONS = {
    "switch": (1, "raw", "choice", "first", "relu", 1.0),
    "gshard": (2, "renormalized", "choice", "first", "gelu", 1.0),
    "maxtext": (2, "renormalized", "token", "multi_hot", "swiglu", 0.8),
    "v_moe": (2, "raw", "batch_priority", "assignments", "gelu", 0.8),
    "lingvo": (2, "renormalized_after_drops", "choice", "first", "geglu", 0.7),
    "all": (4, "raw", "choice", "multi_hot", "relu", 0.5),
}


def make_layer(convention, dispatch, dropless):
  k, gate, order, count, activation, factor = CONVENTIONS[convention]
  router = TopKRouter(D, E, k, gate=gate, order=order, balance_count=count, rngs=nnx.Rngs(0))
  router.w[...] = jax.random.normal(jax.random.key(1), (D, E))  # wide enough that nothing ties
  experts = Experts(E, D, F, activation, init_scale=4.0, rngs=nnx.Rngs(2))
  return MoELayer(router, experts, dispatch, capacity_factor=None if dropless else factor,
                  capacity_rule="megablocks")


def inputs():
  rng = np.random.default_rng(0)
  x_GTD, dy_GTD = rng.normal(size=(2, G, T, D))
  mask_GT = np.ones((G, T), bool)
  mask_GT[1, 6:] = False  # padding at the end, in the middle, and a group of nothing else
  mask_GT[0, 3] = False
  mask_GT[2] = False
  return x_GTD, dy_GTD, mask_GT


def ours(layer, x, dy, mask):
  graphdef, state = nnx.split(layer)

  def f(state, x):
    y, routing = nnx.merge(graphdef, state)(x, Tokens(mask=jnp.asarray(mask)))
    balance, z = routing.losses["load_balance"][0], routing.losses["z"][0]
    return (y * dy).sum() + BALANCE_WEIGHT * balance + Z_WEIGHT * z, (y, routing)

  (_, (y, routing)), (dstate, dx) = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(state, x)
  return y, routing, nnx.to_pure_dict(dstate), dx


def expected(layer, x, dy, mask, convention):
  k, gate, order, count, activation, _ = CONVENTIONS[convention]
  x = np.where(mask[..., None], x, 0.0)
  weights = {n: np.asarray(w, np.float64) for n, w in nnx.to_pure_dict(nnx.state(layer.experts)).items()}
  w = np.asarray(layer.router.w[...], np.float64)
  capacity, logit = layer.capacity(T), x @ w
  lists = oracle.top_k(logit, mask, k, gate, order, capacity)
  y, kept = oracle.moe(x, lists, weights, activation, capacity)
  losses = oracle.top_k_losses(logit, mask, k, count)
  dx, dgate, dweights = oracle.moe_gradient(x, lists, weights, activation, capacity, dy)
  dlogit = oracle.top_k_gradient(
      logit, mask, k, gate, order, capacity, count, dgate, BALANCE_WEIGHT, Z_WEIGHT)
  dx = np.where(mask[..., None], dx + dlogit @ w.T, 0.0)
  return y, lists, kept, losses, dx, np.einsum("gtd,gte->de", x, dlogit), dweights


CASES = [(c, d, dropless, True) for c in CONVENTIONS for d in DISPATCHES for dropless in (False, True)]
CASES += [("maxtext", d, False, False) for d in DISPATCHES]  # nothing promised of tokens


@pytest.mark.parametrize("convention, dispatch, dropless, promised", CASES)
def test_layer_equals_the_loops(convention, dispatch, dropless, promised):
  layer = make_layer(convention, dispatch, dropless)
  if not promised:
    layer.edit = lambda routing: routing.replace(rows_per_token=None)
  x, dy, mask = inputs()
  y, lists, kept, losses, dx, dw, dweights = expected(layer, x, dy, mask, convention)
  got_y, routing, got_d, got_dx = ours(layer, jnp.float32(x), jnp.float32(dy), mask)

  routing = jax.device_get(routing)
  for g, a in itertools.product(range(G), range(len(lists[0]))):
    token, expert, gate, valid = lists[g][a]
    assert bool(routing.valid[g, a]) == bool(valid)
    if valid:
      assert (routing.token[g, a], routing.expert[g, a]) == (token, expert)
  np.testing.assert_array_equal(routing.kept, kept)
  assert dropless or (kept.sum() < routing.valid.sum()), "the case must drop something"
  np.testing.assert_allclose(got_y, y, **CLOSE)
  for name, (total, count) in losses.items():
    np.testing.assert_allclose(routing.losses[name][0], total, **CLOSE)
    assert routing.losses[name][1] == count == 2
  np.testing.assert_allclose(got_dx, dx, **CLOSE)
  np.testing.assert_allclose(got_d["router"]["w"], dw, **CLOSE)
  for name, value in dweights.items():
    np.testing.assert_allclose(got_d["experts"][name], value, **CLOSE)
  valid = sum(v for group in lists for *_, v in group)
  assert routing.metrics["dropped"] == (valid - kept.sum(), valid)
  unserved = sum(mask[g, t] and not any(ok and a[0] == t for a, ok in zip(lists[g], kept[g], strict=True))
                 for g in range(G) for t in range(T))
  assert routing.metrics["token_dropped"] == (unserved, mask.sum())
  load = [sum(v and e == x for group in lists for _, e, _, v in group) for x in range(E)]
  np.testing.assert_array_equal(routing.metrics["load"][0], load)
  prob = [oracle.softmax(row) for row in (x @ np.asarray(layer.router.w[...], np.float64))[mask]]
  entropy, confidence = -sum((p * np.log(p)).sum() for p in prob), sum(p.max() for p in prob)
  for name, total in (("entropy", entropy), ("confidence", confidence)):
    np.testing.assert_allclose(routing.metrics[name], (total, mask.sum()), **CLOSE)
  assert routing.metrics["load"][1] == mask.sum()
  assert routing.metrics["experts_per_token"] == (valid, mask.sum())
