"""MH-MoE equals loops over sub-tokens, in value and gradient; what is around a layer counts tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe import (
    DISPATCHES,
    Experts,
    Heads,
    MoELayer,
    MultiHeadLayer,
    Tokens,
    TopKRouter,
    make_router,
)
from tests import oracle

G, T, H, P, F, E = 8, 6, 2, 4, 6, 4  # P: width of a sub-token
D = H * P
# float32 against float64 over sums of at most a hundred terms of order 1, through three products in turn.
CLOSE = dict(rtol=5e-5, atol=5e-5)


def make_layer(dispatch="ragged", factor=None, projections="both", router=None, shared=None, num_experts=E):
  if router is None:
    router = TopKRouter(P, num_experts, 2, gate="renormalized", rngs=nnx.Rngs(0))
    router.w[...] = jax.random.normal(jax.random.key(1), (P, num_experts))  # wide enough that nothing ties
  experts = Experts(router.num_experts, P, F, "swiglu", init_scale=4.0, rngs=nnx.Rngs(2))
  heads = Heads(D, H, projections, rngs=nnx.Rngs(3))
  for i, name in enumerate(("b_head", "b_merge")):
    if (b := getattr(heads, name)) is not None:
      b[...] = jax.random.normal(jax.random.key(i), b.shape)
  return MultiHeadLayer(heads, router, experts, dispatch, group_size=T, capacity_factor=factor,
                        capacity_rule="megablocks", shared=shared)


@functools.cache
def inputs():
  rng = np.random.default_rng(0)
  x_GTD, dy_GTD = rng.normal(size=(2, G, T, D))
  mask_GT = np.ones((G, T), bool)
  mask_GT[1, 4:] = mask_GT[0, 2] = mask_GT[3] = False
  return x_GTD, dy_GTD, mask_GT


def run(layer, x, dy, mask):
  graphdef, state = nnx.split(layer)

  def f(state, x):
    y, routing = nnx.merge(graphdef, state)(x, Tokens(mask=jnp.asarray(mask)))
    return (y * dy).sum(), (y, routing)

  (_, (y, routing)), (dstate, dx) = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(
      state, jnp.float32(x))
  return y, jax.device_get(routing), nnx.to_pure_dict(dstate), dx


def by_hand(layer, x, dy, mask):
  """(y, kept, dx, gradients of heads, router and experts): sub-tokens are tokens of the oracle."""
  get = lambda module: {n: np.asarray(w, np.float64) for n, w in nnx.to_pure_dict(nnx.state(module)).items()}
  heads, weights, w = get(layer.heads), get(layer.experts), get(layer.router)["w"]
  x, dy = (np.where(mask[..., None], a, 0.0) for a in (x, dy))
  u_GSP, mask_GS = oracle.sub_tokens(x, mask, H, heads.get("w_head"), heads.get("b_head"))
  logit, capacity = u_GSP @ w, layer.capacity(T * H)
  lists = oracle.top_k(logit, mask_GS, 2, "renormalized", "choice", capacity)
  v_GSP, kept = oracle.moe(u_GSP, lists, weights, "swiglu", capacity)
  v = v_GSP.reshape(G, T, D)
  y = np.where(mask[..., None], v @ heads["w_merge"] + heads["b_merge"] if "w_merge" in heads else v, 0.0)

  found = {}
  if "w_merge" in heads:
    found |= {"w_merge": np.einsum("gti,gtj->ij", v, dy), "b_merge": dy.sum((0, 1))}
    dy = dy @ heads["w_merge"].T
  du, dgate, dweights = oracle.moe_gradient(u_GSP, lists, weights, "swiglu", capacity, dy.reshape(G, -1, P))
  dlogit = oracle.top_k_gradient(
      logit, mask_GS, 2, "renormalized", "choice", capacity, "first", dgate, 0.0, 0.0)
  du = np.where(mask_GS[..., None], du + dlogit @ w.T, 0.0).reshape(G, T, D)
  dx = du
  if "w_head" in heads:
    found |= {"w_head": np.einsum("gti,gtj->ij", x, du), "b_head": du.sum((0, 1))}
    dx = np.where(mask[..., None], du @ heads["w_head"].T, 0.0)
  return y, kept, dx, {"heads": found, "router": {"w": np.einsum("gsd,gse->de", u_GSP, dlogit)},
                       "experts": dweights}


@pytest.mark.parametrize("dispatch, factor, projections", [
    *((d, f, "both") for d in DISPATCHES for f in (None, 0.7)),
    *(("ragged", None, p) for p in ("head", "merge", "none"))])
def test_layer_equals_the_loops(dispatch, factor, projections):
  layer, (x, dy, mask) = make_layer(dispatch, factor, projections), inputs()
  expected_y, kept, expected_dx, expected_d = by_hand(layer, x, dy, mask)
  y, routing, found, dx = run(layer, np.where(mask[..., None], x, np.nan), dy, mask)
  np.testing.assert_array_equal(routing.kept, kept)
  assert factor is None or kept.sum() < routing.valid.sum(), "the case must drop something"
  np.testing.assert_allclose(y, expected_y, **CLOSE)
  np.testing.assert_allclose(dx, expected_dx, **CLOSE)
  assert set(found.get("heads", {})) == set(expected_d["heads"])
  for module, arrays in expected_d.items():
    for name, value in arrays.items():
      np.testing.assert_allclose(found[module][name], value, **CLOSE, err_msg=name)
  assert routing.metrics["dropped"] == (H * 2 * mask.sum() - kept.sum(), H * 2 * mask.sum())
  assert routing.metrics["load"][1] == H * mask.sum()


def test_capacity_counts_sub_tokens_and_a_group_tokens():
  layer = make_layer("scatter", 1.0)
  assert layer.group_size == T * H and layer.capacity(T * H) == 2 * H * T // E  # megablocks counts k = 2
  for shape in ((3, 4, D), (2, 2 * T, D)):
    y, routing = jax.eval_shape(lambda x: layer(x), jnp.ones(shape))
    assert y.shape == shape and routing.token.shape == (shape[0] * shape[1] // T, T * H * 2)
  assert jax.eval_shape(lambda x: layer(x), jnp.ones((1, T, D), jnp.bfloat16))[0].dtype == jnp.bfloat16
  with pytest.raises(UserError, match="group_size=12 does not divide 3 x 6 = 18 tokens"):
    layer(jnp.ones((3, 3, D)))
  with pytest.raises(UserError, match=r"takes \[rows, tokens, 8\]"):
    layer(jnp.ones((1, T, P)))


def test_one_head_without_projections_is_the_layer_without_heads():
  router = TopKRouter(D, E, 1, rngs=nnx.Rngs(0))
  experts = Experts(E, D, F, rngs=nnx.Rngs(2))
  x = jax.random.normal(jax.random.key(0), (2, T, D))
  headed = MultiHeadLayer(Heads(D, 1, "none", rngs=nnx.Rngs(3)), router, experts)
  plain, headed = (jax.jit(layer)(x)[0] for layer in (MoELayer(router, experts), headed))
  np.testing.assert_array_equal(plain, headed)


@pytest.mark.parametrize("mesh, dispatch, factor", [
    ((2, 4, 1), "ragged", None), ((2, 2, 2), "scatter", 1.0),
    pytest.param((2, 2, 2), "ragged", None, marks=pytest.mark.slow),
    pytest.param((2, 4, 1), "einsum", 1.0, marks=pytest.mark.slow)])
def test_the_same_on_every_mesh(mesh, dispatch, factor):
  x, dy, mask = inputs()
  alone = run(make_layer(dispatch, factor), x, dy, mask)
  with partitioning.use(partitioning.make_mesh(*mesh)):
    spread = run(make_layer(dispatch, factor), x, dy, mask)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
    # float32 sums of a few hundred terms, taken in another order.
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=2e-5)


OTHERS = [("hash", {}), ("task", {}), ("base", {}), ("expert_choice", dict(k=2)), ("reinforce", {}),
          ("v_moe", dict(k=2, order="batch_priority")), ("dselect_k", dict(k=2)), ("cosine", dict(k=2)),
          ("random", {}), ("permuted", dict(of="comet", k=2))]


@pytest.mark.parametrize("name, arguments", [
    pytest.param(*other, marks=[pytest.mark.slow] * (i > 4)) for i, other in enumerate(OTHERS)], ids=str)
def test_any_router_routes_sub_tokens_as_it_routes_tokens(name, arguments):
  """The layer is one without heads, on the parts of the head projection, then the merge projection."""
  layer = make_layer(router=make_router(name, P, E, rngs=nnx.Rngs(params=0), **arguments))
  x, _, mask = inputs()
  tokens = Tokens(mask=jnp.asarray(mask), id=jnp.arange(G * T).reshape(G, T) % 50 + 3,
                  sequence=jnp.arange(G * T).reshape(G, T) // 3, task=jnp.arange(G * T).reshape(G, T) % 3)
  repeated = jax.tree.map(lambda a: jnp.asarray(np.repeat(a, H, 1)), tokens)
  x = jnp.float32(np.where(mask[..., None], x, 0.0))
  y, routing = jax.jit(layer)(x, tokens)
  inner = MoELayer(layer.router, layer.experts, "ragged", T * H)
  parts, expected = jax.jit(inner)(layer.heads.split(x), repeated)
  # The same float32 products, compiled into another program.
  merged = np.where(mask[..., None], layer.heads.merge(parts), 0.0)
  np.testing.assert_allclose(y, merged, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(routing.expert, expected.expert)
  if routing.log_prob is not None:  # of all choices of a token, and its mean expected reward
    np.testing.assert_allclose(routing.log_prob, expected.log_prob.reshape(G, T, H).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(routing.value, expected.value.reshape(G, T, H).mean(-1), rtol=1e-5)


@pytest.mark.slow
def test_edits_of_a_token_reach_its_sub_tokens_and_shared_experts_whole_tokens():
  seen = {}
  layer = make_layer(shared=lambda x, key: seen.setdefault("x", x))
  layer.edit = lambda routing, edit_GT: seen.setdefault("edit", edit_GT) is None or routing
  x = jnp.ones((1, T, D))
  y, _ = layer(x, edits=jnp.arange(T)[None])
  np.testing.assert_array_equal(seen["edit"], np.repeat(np.arange(T), H)[None])
  layer.whole = None
  np.testing.assert_allclose(y - layer(x, edits=jnp.arange(T)[None])[0], x, atol=1e-5)  # float32 sums
  assert seen["x"].shape == x.shape


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(UserError, match="model.moe_heads=3 does not divide model.embed_dim=8; choose a div"):
    Heads(8, 3, rngs=nnx.Rngs(0))
  with pytest.raises(UserError, match="model.moe_projections='heads' is unknown"):
    Heads(8, 2, "heads", rngs=nnx.Rngs(0))


def test_projections_start_as_xavier():
  heads = Heads(256, 4, rngs=nnx.Rngs(0))
  for w, gain in ((heads.w_head, 0.5**0.5), (heads.w_merge, 1.0)):
    bound = gain * (6 / 512)**0.5  # of the uniform distribution
    # 65,536 draws: the largest is within 0.1% of the bound, the deviation within 1%.
    assert 0.999 * bound < np.abs(w[...]).max() <= bound
    np.testing.assert_allclose(np.std(w[...]), bound / 3**0.5, rtol=0.01)
  assert not np.any(heads.b_head[...]) and not np.any(heads.b_merge[...])
  one = Heads(256, 4, "merge", rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(one.w_merge[...], heads.w_merge[...])
  assert one.w_head is None
