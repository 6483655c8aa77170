"""Facts about a sparse layer that hold for any weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import DISPATCHES, Experts, MoELayer, Tokens, TopKRouter
from sparse_experts.moe.experts import drop

D, F, E = 6, 8, 4
CLOSE = dict(rtol=1e-5, atol=1e-6)  # float32, another order of sums


def make(dispatch="ragged", k=1, num_experts=E, factor=None, activation="gelu", group_size=None, edit=None,
         dropout=0.0, **router):
  gate = TopKRouter(D, num_experts, k, rngs=nnx.Rngs(3), **router)
  gate.w[...] *= 50
  experts = Experts(num_experts, D, F, activation, dropout=dropout, init_scale=4.0, rngs=nnx.Rngs(4))
  return compiled(MoELayer(gate, experts, dispatch, group_size, factor, "megablocks", edit=edit))


class compiled:
  """A layer whose calls are compiled: eager dispatch would compile each operation."""

  def __init__(self, layer):
    graphdef, self.state = nnx.split(layer)
    self.layer = layer
    self.apply = jax.jit(lambda state, *arguments: nnx.merge(graphdef, state)(*arguments))

  def __call__(self, x, tokens=None, key=None):
    return self.apply(self.state, x, tokens, key)

  def __getattr__(self, name):
    return getattr(self.layer, name)


def tokens(G=2, T=8, seed=0):
  return jax.random.normal(jax.random.key(seed), (G, T, D))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_dropped_token_is_zero_and_has_no_gradient(dispatch):
  layer, x = make(dispatch, k=2, factor=0.5), tokens()
  y, routing = layer(x)
  served = jnp.zeros(x.shape[:2], bool).at[jnp.arange(2)[:, None], routing.token].max(routing.kept)
  assert 0 < (~served).sum() < served.size
  np.testing.assert_array_equal(jnp.abs(y).sum(-1) > 0, served)
  dx = jax.grad(lambda x: (layer(x)[0] ** 2).sum())(x)
  np.testing.assert_array_equal(jnp.abs(dx).sum(-1) > 0, served)


def test_permuted_tokens_permute_outputs_when_nothing_drops():
  layer, x = make(k=2), tokens()
  order = jax.random.permutation(jax.random.key(1), 8)
  np.testing.assert_allclose(layer(x[:, order])[0], layer(x)[0][:, order], **CLOSE)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_padding_changes_nothing(dispatch):
  """Even NaN in it: outputs, losses, metrics and gradients are those of the tokens alone."""
  layer = make(dispatch, k=2, factor=1.0, order="batch_priority", activation="swiglu")
  x = tokens(T=12)
  mask = jnp.ones((2, 12), bool).at[:, 7:].set(False)

  def f(x):
    y, routing = layer(x, Tokens(mask=mask))
    total = sum(loss / count for loss, count in routing.losses.values())
    return (jnp.where(mask[..., None], y, 0) ** 2).sum() + total, (y, routing.losses, routing.metrics)

  other = jnp.where(mask[..., None], x, jnp.nan)
  (a, aux_a), dx_a = jax.value_and_grad(f, has_aux=True)(x)
  (b, aux_b), dx_b = jax.value_and_grad(f, has_aux=True)(other)
  jax.tree.map(np.testing.assert_array_equal, (a, aux_a, dx_a), (b, aux_b, dx_b))
  assert not jnp.abs(aux_a[0][:, 7:]).any() and not jnp.abs(dx_a[:, 7:]).any()
  alone_y, alone = make(dispatch, k=2, factor=None, order="batch_priority", activation="swiglu")(x[:, :7])
  for name in ("load_balance", "z"):
    np.testing.assert_allclose(alone.losses[name], aux_a[1][name], **CLOSE)


def test_one_expert_is_a_dense_network():
  layer, x = make(num_experts=1), tokens()
  w_in, w_out = layer.experts.w_in[...][0], layer.experts.w_out[...][0]
  np.testing.assert_allclose(layer(x)[0], jax.nn.gelu(x @ w_in) @ w_out, **CLOSE)


def test_all_experts_give_the_dense_weighted_sum():
  layer, x = make(k=E), tokens()
  prob = jax.nn.softmax(jnp.einsum("gtd,de->gte", x, layer.router.w[...]))
  h = jax.nn.gelu(jnp.einsum("gtd,edf->gtef", x, layer.experts.w_in[...]))
  dense = jnp.einsum("gtef,efd,gte->gtd", h, layer.experts.w_out[...], prob)
  np.testing.assert_allclose(layer(x)[0], dense, **CLOSE)


def test_fewer_tokens_than_experts():
  layer, x = make(num_experts=16, factor=1.0), tokens(T=3)
  y, routing = layer(x)
  assert layer.capacity(3) == 1 and y.shape == x.shape and routing.kept.sum() >= 2


def test_only_experts_with_tokens_have_gradient():
  layer = make()
  x = jnp.broadcast_to(tokens(G=1, T=1), (1, 5, D))  # all alike: one expert
  chosen = int(layer(x)[1].expert[0, 0])
  graphdef, state = nnx.split(layer.experts)
  layout = layer.experts.plan_layout(jnp.zeros(E, jnp.int32).at[chosen].set(5), 5)
  y = lambda s: layout.from_buffer(nnx.merge(graphdef, s).grouped(layout.to_buffer(x[0]), layout), 5)
  dw = jax.grad(lambda s: (y(s) ** 2).sum())(state)
  for w in jax.tree.leaves(dw):
    np.testing.assert_array_equal(jnp.abs(w).sum((1, 2)) > 0, jnp.arange(E) == chosen)


def test_groups_are_consecutive_tokens_and_do_not_meet():
  """A layer with groups of 4 equals four calls on those tokens."""
  layer, x = make(k=2, factor=0.5, group_size=4), tokens()
  y, routing = layer(x)
  assert routing.token.shape == (4, 8)
  apart = [layer(x.reshape(4, 1, 4, D)[g])[0] for g in range(4)]
  np.testing.assert_allclose(y.reshape(4, 4, D), jnp.concatenate(apart), **CLOSE)


def test_dropless_pads_a_last_group_that_is_not_full():
  layer, x = make(k=2, group_size=5), tokens()
  np.testing.assert_allclose(layer(x)[0], make(k=2)(x)[0], **CLOSE)


@pytest.mark.parametrize("dispatch, factor, rows", [
    ("ragged", 1.0, 2), ("scatter", 1.5, 4 * 6 / 8), ("einsum", None, 4)])
def test_rows_per_token_of_groups_that_are_rows(dispatch, factor, rows):
  """Without a group size a row of 8 tokens is a group: int(1.5 * 2 * 8 / 4) = 6 slots, or 8 when dropless."""
  assert make(dispatch, k=2, factor=factor).rows_per_token(8) == rows


def test_group_size_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match="group_size=5 does not divide 2 x 8 = 16 tokens"):
    make(factor=1.0, group_size=5)(tokens())


@pytest.mark.parametrize("order, k, factor, declared", [
    ("choice", 2, None, "self"), ("choice", 1, 1.0, "past"), ("token", 2, 0.5, "past"),
    ("choice", 2, 0.5, "batch"), ("batch_priority", 1, 1.0, "batch")])
def test_causality_is_what_is_declared(order, k, factor, declared):
  """Changing token 3 changes others' outputs only as the layer declares, and does change them so.

  Two sequences make a group: the second is later than all of the first.
  """
  layer = make(k=k, factor=factor, order=order, group_size=16)
  assert layer.causality == declared
  moved = {"before": False, "after": False, "next sequence": False}
  for seed in range(20):
    x = tokens(G=2, seed=seed)
    other = x.at[0, 3].set(3 * jax.random.normal(jax.random.key(100 + seed), (D,)))
    changed = (jnp.abs(layer(x)[0] - layer(other)[0]).max(-1) > 1e-6).reshape(-1)
    moved["before"] |= bool(changed[:3].any())
    moved["after"] |= bool(changed[4:8].any())
    moved["next sequence"] |= bool(changed[8:].any())
  assert moved == {"before": declared == "batch", "after": declared != "self",
                   "next sequence": declared != "self"}


def test_a_bounded_exchange_depends_on_no_other_token():
  layer = make(k=2)
  layer.layer.exchange_rows_factor = 1.0
  assert layer.causality == "self"


def test_dropout_is_the_same_in_every_layout_and_off_without_a_key():
  x, key = tokens(), jax.random.key(9)
  layers = [make(name, k=2, dropout=0.5) for name in DISPATCHES]
  outputs = [layer(x, key=key)[0] for layer in layers]
  for y in outputs[1:]:
    np.testing.assert_allclose(y, outputs[0], **CLOSE)
  assert jnp.abs(outputs[0] - layers[0](x)[0]).max() > 0.1
  np.testing.assert_allclose(layers[0](x)[0], make(k=2)(x)[0], **CLOSE)


def test_dropout_masks_are_of_the_rate_and_of_each_row():
  seed_R = jnp.array([5, 6, 5], jnp.uint32)
  h_RF = drop(jnp.ones((3, 2000)), seed_R, jax.random.key(0), 0, rate=0.2, width=2000)
  np.testing.assert_allclose(jnp.unique(h_RF), [0, 1.25])
  # Deviation of a share of 2000 draws is 0.009; within 4 of them.
  np.testing.assert_allclose((h_RF == 0).mean(1), 0.2, atol=0.036)
  assert (h_RF[0] == h_RF[2]).all() and (h_RF[0] != h_RF[1]).any()


def test_every_group_token_and_expert_has_its_own_seed():
  _, routing = make(k=E, dropout=0.5)(tokens(G=3), key=jax.random.key(0))
  assert len(np.unique(routing.seed)) == routing.seed.size == 3 * 8 * E


def test_weights_start_with_the_deviation_of_one_experts_fan_in():
  experts = Experts(16, 400, 100, "swiglu", init_scale=0.1, rngs=nnx.Rngs(0))
  for w_EDF, fan_in in ((experts.w_in, 400), (experts.w_gate, 400), (experts.w_out, 100)):
    # 40,000 draws an expert: the deviation is known to 0.4%.
    np.testing.assert_allclose(w_EDF[...].std((1, 2)), (0.1 / fan_in) ** 0.5, rtol=0.02)
  assert (experts.w_in[0] != experts.w_in[1]).all()


def test_bfloat16_rows_with_a_float32_router():
  """The routing is that of the float32 rows' values; the output is within bfloat16's 8 bits."""
  layer, x = make(k=2, gate="renormalized"), tokens().astype(jnp.bfloat16)
  y, routing = layer(x)
  exact, same = layer(x.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16 and routing.gate.dtype == jnp.float32
  np.testing.assert_array_equal(routing.expert, same.expert)
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03 * float(jnp.abs(exact).max()))
