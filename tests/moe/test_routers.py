"""The golden toy (recomputed by independent scripts in float64) and the conventions' own properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, MoELayer, Tokens, TopKRouter, make_router
from sparse_experts.moe.routing import as_pair, slots

LOGIT_GTE = jnp.array([[
    [2.1, 1.0, 0.0], [1.0, 0.0, 2.0], [3.0, 1.9, 1.2], [0.5, 0.0, -1.0], [1.0, 1.5, 0.0], [2.5, 0.0, 1.0]]])
MASK_GT = jnp.ones((1, 6), bool)
PRINTED = 2e-6  # golden values have six digits


def route(k, capacity=None, key=None, mask=MASK_GT, **fields):
  return TopKRouter(4, 3, k, rngs=nnx.Rngs(0), **fields).route(
      LOGIT_GTE, mask, capacity=capacity, key=key)


def kept(routing, capacity):
  """Kept (token, choice, expert) in the order of claims; choice from each token's falling gates."""
  slot = np.asarray(slots(routing.expert, routing.valid, 3))[0]
  found, seen = [], {}
  token, expert, valid = (np.asarray(a)[0] for a in (routing.token, routing.expert, routing.valid))
  for a in range(len(token)):
    choice = seen[token[a]] = seen.get(token[a], -1) + 1
    if valid[a] and slot[a] < capacity:
      found.append((int(token[a]), choice, int(expert[a])))
  return found


def test_golden_choices_and_losses():
  one, two = route(1), route(2, gate="renormalized", balance_count="multi_hot")
  assert one.expert.tolist() == [[0, 2, 0, 0, 1, 0]]
  np.testing.assert_allclose(
      one.gate[0], [0.687131, 0.665241, 0.667481, 0.546549, 0.546549, 0.766157], atol=PRINTED)
  np.testing.assert_allclose(one.losses["load_balance"][0], 1.310886, atol=PRINTED)
  np.testing.assert_allclose(two.losses["load_balance"][0], 2.328162, atol=PRINTED)
  np.testing.assert_allclose(one.losses["z"][0], 6.135246, atol=PRINTED)
  assert two.expert.tolist() == [[0, 2, 0, 0, 1, 0, 1, 0, 1, 1, 0, 2]]
  np.testing.assert_allclose(
      two.gate[0, :6], [0.750260, 0.731059, 0.750260, 0.622459, 0.622459, 0.817574], atol=PRINTED)
  np.testing.assert_allclose(one.metrics["load"][0], [4, 1, 1])


def test_probabilities_are_for_those_who_look_at_a_routing():
  routing = route(2)
  np.testing.assert_allclose(routing.prob[0, 1], [0.244728, 0.090031, 0.665241], atol=PRINTED)
  assert routing.only_list().prob is None and routing.only_stats().prob is None


def test_golden_order_of_drops():
  assert kept(route(2), 2) == [(0, 0, 0), (1, 0, 2), (2, 0, 0), (4, 0, 1), (0, 1, 1), (5, 1, 2)]
  assert kept(route(2, order="token"), 2) == [
      (0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 0), (2, 1, 1), (5, 1, 2)]
  prioritised = route(2, order="batch_priority")
  assert prioritised.token[0, :4].tolist() == [5, 0, 2, 1]  # tokens 3 and 4 tie
  assert sorted(kept(prioritised, 2)) == sorted(
      [(5, 0, 0), (0, 0, 0), (1, 0, 2), (4, 0, 1), (5, 1, 2), (0, 1, 1)])


def test_padding_sorts_last_under_batch_priority():
  mask = MASK_GT.at[0, 5].set(False)  # the most confident token
  assert route(2, order="batch_priority", mask=mask).token[0, 5] == 5


def test_gates_renormalised_after_drops():
  """Token 0 keeps both choices, token 2 its first only, token 5 its second only."""
  routing = route(2, capacity=2, gate="renormalized_after_drops")
  np.testing.assert_allclose(routing.gate[0, [0, 6]], [0.750260, 0.249740], atol=PRINTED)
  np.testing.assert_allclose(routing.gate[0, [2, 11]], [1.0, 1.0], atol=PRINTED)
  assert routing.gate[0, 3] == routing.gate[0, 9] == 0, "token 3 is lost entirely"


def test_second_choice_is_used_in_proportion_to_its_gate():
  """P(used) = min(1, gate / threshold); the first choice always; without a key all are used."""
  router = TopKRouter(4, 3, 2, gate="renormalized", skip_threshold=0.5, rngs=nnx.Rngs(0))
  logit = jnp.broadcast_to(LOGIT_GTE, (4000, 6, 3))
  mask = jnp.ones((4000, 6), bool)
  routing = router.route(logit, mask, key=jax.random.key(0))
  assert routing.valid[:, :6].all()
  used = routing.valid[:, 6:].mean(0)
  expected = np.minimum(1, np.asarray(routing.gate[0, 6:]) / 0.5)
  # Deviation of a share over 4000 draws is at most 0.0079; six of them within 4 deviations.
  np.testing.assert_allclose(used, expected, atol=0.032)
  assert router.route(logit, mask).valid.all()


def test_first_choices_are_never_skipped_and_skips_do_not_count():
  """Raw gates all below the threshold of 1; the balance loss is that of the router's wishes."""
  router = TopKRouter(4, 3, 3, skip_threshold=1.0, balance_count="assignments", rngs=nnx.Rngs(0))
  logit, mask = jnp.broadcast_to(LOGIT_GTE, (4000, 6, 3)), jnp.ones((4000, 6), bool)
  routing, plain = router.route(logit, mask, key=jax.random.key(1)), router.route(logit, mask)
  assert routing.valid[:, :6].all() and (routing.gate < 0.8).all()
  # As above, twelve shares; independent draws, so half of them may be used by chance nowhere together.
  np.testing.assert_allclose(routing.valid[:, 6:].mean(0), routing.gate[0, 6:], atol=0.036)
  np.testing.assert_array_equal(routing.losses["load_balance"], plain.losses["load_balance"])


def test_gates_renormalised_after_skips_sum_to_one():
  router = TopKRouter(4, 3, 3, gate="renormalized_after_drops", skip_threshold=1.0, rngs=nnx.Rngs(0))
  routing = router.route(LOGIT_GTE, MASK_GT, key=jax.random.key(0))
  assert not routing.valid.all()
  gate_TK = jnp.where(routing.valid, routing.gate, 0)[0].reshape(3, 6)
  np.testing.assert_allclose(gate_TK.sum(0), 1, rtol=1e-6)
  assert not routing.gate[~routing.valid].any()


def test_loss_weights_are_those_given():
  router = TopKRouter(4, 3, load_balance_weight=0.5, z_weight=0.25, rngs=nnx.Rngs(0))
  assert router.loss_weights == {"load_balance": 0.5, "z": 0.25}


def test_underflowing_probabilities_still_give_different_experts():
  logit = jnp.array([[[0.0, 200.0, 0.0]]])
  routing = TopKRouter(4, 3, 3, rngs=nnx.Rngs(0)).route(logit, jnp.ones((1, 1), bool))
  assert routing.expert.tolist() == [[1, 0, 2]]


def test_jitter_changes_the_router_input_within_its_bounds():
  """One-feature tokens: the logit is multiplied by a factor in [1 - j, 1 + j], only with a key."""
  router = TopKRouter(1, 2, 1, jitter=0.1, rngs=nnx.Rngs(0))
  router.w[...] = jnp.array([[1.0, 0.0]])
  tokens = Tokens(mask=jnp.ones((1, 1000), bool))
  x = jnp.ones((1, 1000, 1))
  logit = lambda gate: jnp.log(gate / (1 - gate))
  noisy = logit(router(x, tokens, None, jax.random.key(0)).gate)
  assert 0.9 - 1e-5 <= noisy.min() < 0.91 and 1.09 < noisy.max() <= 1.1 + 1e-5
  np.testing.assert_allclose(logit(router(x, tokens, None).gate), 1.0, rtol=1e-5)


def test_input_dropout_is_of_the_router_input_and_keeps_its_mean():
  """One-feature tokens of logit 1: 0 with probability 1/4, else 4/3, and only with a key."""
  router = TopKRouter(1, 2, 1, input_dropout=0.25, rngs=nnx.Rngs(0))
  router.w[...] = jnp.array([[1.0, 0.0]])
  tokens = Tokens(mask=jnp.ones((1, 1000), bool))
  x = jnp.ones((1, 1000, 1))
  logit = lambda prob: np.asarray(jnp.log(prob[0, :, 0] / prob[0, :, 1]))
  noisy, plain = logit(router(x, tokens, None, jax.random.key(0)).prob), logit(router(x, tokens, None).prob)
  dropped = noisy < 0.5
  np.testing.assert_allclose(noisy[dropped], 0.0, atol=1e-6)
  np.testing.assert_allclose(noisy[~dropped], 4 / 3, rtol=1e-5)
  assert abs(dropped.mean() - 0.25) < 0.055  # 4 deviations of a share of 1000
  np.testing.assert_allclose(plain, 1.0, rtol=1e-5)


def test_uniform_router_has_balance_loss_one():
  even = jnp.zeros((2, 9, 3))
  mask = jnp.ones((2, 9), bool)
  for count, value in (("first", 1.0), ("assignments", 1.0), ("multi_hot", 2.0)):
    loss, groups = TopKRouter(
        4, 3, 2, balance_count=count, rngs=nnx.Rngs(0)).route(even, mask).losses["load_balance"]
    np.testing.assert_allclose(loss / groups, value, rtol=1e-6)


@pytest.mark.parametrize("order, kept_E", [("choice", (2, 1, 1)), ("token", (1, 0, 1))])
def test_golden_balance_of_kept_choices(order, kept_E):
  """First choices kept with two slots, of all six tokens; token-major, second choices take slots of them."""
  found = route(2, capacity=2, order=order, balance_count="first_kept").losses["load_balance"]
  expected = 3 * (np.array(kept_E) / 6 * [0.540591, 0.246980, 0.212429]).sum()
  np.testing.assert_allclose(found, (expected, 1), atol=PRINTED)
  free = route(1, balance_count="first_kept").losses["load_balance"]
  np.testing.assert_allclose(free, (1.310886, 1), atol=PRINTED)


@pytest.mark.parametrize("count, scope", [("multi_hot", "group"), ("first", "batch")])
def test_losses_that_count_padding_as_flaxformer(count, scope):
  """Loops over all S tokens: padding has no expert and no probability, and logits of 0 in the z-loss."""
  G, S, E, k = 3, 5, 4, 2
  logit_GTE = np.random.default_rng(0).normal(size=(G, S, E))
  mask_GT = np.ones((G, S), bool)
  mask_GT[0, 3:] = mask_GT[2] = False
  sums = np.zeros((3, G, E))  # f, P, z
  for g, t in np.ndindex(G, S):
    logit_E = logit_GTE[g, t] if mask_GT[g, t] else np.zeros(E)
    sums[2, g] += np.log(np.exp(logit_E).sum()) ** 2
    if mask_GT[g, t]:
      sums[1, g] += np.exp(logit_E) / np.exp(logit_E).sum()
      sums[0, g, np.argsort(-logit_E)[:k if count == "multi_hot" else 1]] += 1
  groups = G if scope == "group" else 1
  f, P, z = sums / S if scope == "group" else sums.sum(1, keepdims=True) / (G * S)
  router = TopKRouter(4, E, k, balance_count=count, scope=scope, loss_padding="flaxformer", rngs=nnx.Rngs(0))
  routing = router.route(jnp.asarray(logit_GTE, jnp.float32), jnp.asarray(mask_GT))
  found = {name: as_pair(loss) for name, loss in routing.losses.items()}
  np.testing.assert_allclose(found["load_balance"], (E * (f * P).sum(), groups), rtol=1e-5)
  np.testing.assert_allclose(found["z"], (z[:, 0].sum(), groups), rtol=1e-5)


def test_losses_that_take_padding_for_tokens_as_hugging_face():
  """The losses of a layer whose mask is all true; output and list are those of the real tokens."""
  rng = np.random.default_rng(0)
  x_GTD, mask_GT = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32), np.ones((2, 6), bool)
  mask_GT[0, 3:] = False

  def call(loss_padding, mask_GT):
    router = TopKRouter(4, 4, 2, balance_count="multi_hot", loss_padding=loss_padding, rngs=nnx.Rngs(0))
    router.w[...] *= 100  # scores of order 1: the losses differ
    layer = MoELayer(router, Experts(4, 4, 8, rngs=nnx.Rngs(1)))
    y_GTD, routing = layer(x_GTD, Tokens(mask=jnp.asarray(mask_GT)))
    return y_GTD, routing

  (y_GTD, routing), (alone_GTD, alone), (_, every) = (
      call("hugging_face", mask_GT), call("excluded", mask_GT), call("excluded", np.ones((2, 6), bool)))
  for name in ("load_balance", "z"):
    np.testing.assert_allclose(as_pair(routing.losses[name]), as_pair(every.losses[name]), rtol=1e-6)
    assert not np.isclose(as_pair(alone.losses[name])[0], as_pair(every.losses[name])[0], rtol=1e-3)
  np.testing.assert_array_equal(y_GTD, alone_GTD)
  np.testing.assert_array_equal(routing.valid, alone.valid)


@pytest.mark.parametrize("count, scale", [("first", 1), ("multi_hot", 2), ("assignments", 1)])
def test_losses_over_the_batch(count, scale):
  """Of all real tokens together, though two of the groups hold other numbers of them."""
  rng = np.random.default_rng(0)
  logit_NE, mask_GT = rng.normal(size=(15, 4)), np.ones((3, 5), bool)
  mask_GT[0, 3:] = mask_GT[2] = False
  router = TopKRouter(4, 4, 2, balance_count=count, scope="batch", rngs=nnx.Rngs(0))
  routing = router.route(jnp.asarray(logit_NE.reshape(3, 5, 4), jnp.float32), jnp.asarray(mask_GT))
  logit_NE = logit_NE[mask_GT.reshape(-1)]
  prob_NE = np.exp(logit_NE) / np.exp(logit_NE).sum(-1, keepdims=True)
  chosen_NK = np.argsort(-logit_NE, axis=-1)[:, :1 if count == "first" else 2]
  share_E = np.bincount(chosen_NK.reshape(-1), minlength=4) / chosen_NK.size
  expected = scale * 4 * (share_E * prob_NE.mean(0)).sum()
  np.testing.assert_allclose(as_pair(routing.losses["load_balance"]), (expected, 1), rtol=1e-5)
  np.testing.assert_allclose(
      as_pair(routing.losses["z"]), ((np.log(np.exp(logit_NE).sum(-1)) ** 2).mean(), 1), rtol=1e-5)


@pytest.mark.parametrize("name", ["top_k", "deepseek_moe", "no_token_left_behind", "expert_choice"])
def test_a_bias_is_added_to_the_logits(name):
  x_GTD, tokens = jax.random.normal(jax.random.key(0), (2, 6, 4)), Tokens(mask=jnp.ones((2, 6), bool))
  plain, biased = (make_router(name, 4, 3, bias=bias, rngs=nnx.Rngs(0)) for bias in (False, True))
  routed = lambda router: router(x_GTD, tokens, 2)
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  same(routed(biased), routed(plain))
  biased.b[...] = jnp.array([0.0, 2.0, -1.0])
  logit_GTE = x_GTD @ plain.w[...] + biased.b[...][None, None]
  expected = plain.route(logit_GTE, tokens.mask, capacity=2)
  np.testing.assert_allclose(routed(biased).prob, expected.prob, rtol=1e-5)
  graphdef, state = nnx.split(biased)
  slope = jax.grad(lambda state: routed(nnx.merge(graphdef, state)).gate.sum())(state)
  assert np.asarray(slope["b"][...]).any()


@pytest.mark.parametrize("arguments, message", [
    (dict(name="topk"), "router.name='topk' is unknown; did you mean 'top_k'?"),
    (dict(name="top_k", k=4), "router.k=4 is not between 1 and num_experts=3"),
    (dict(name="top_k", k=0), "router.k=0 is not between"),
    (dict(name="top_k", gate="renormalised"), "did you mean 'renormalized'"),
    (dict(name="top_k", choose="sample"), "router.choose='sample' is unknown; did you mean 'sampled'"),
    (dict(name="top_k", input_dropout=1.0), "router.input_dropout=1.0 is out of range; choose from 0 to"),
    (dict(name="top_k", temperature=1.0), "temperature"),
    (dict(name="no.such:Router"), "router.name='no.such:Router' cannot be imported"),
])
def test_mistakes_are_named(arguments, message):
  with pytest.raises(UserError, match=message.replace("?", r"\?").replace(".", r"\.")):
    make_router(**arguments, d=4, num_experts=3, rngs=nnx.Rngs(0))


def test_sampled_experts_come_as_often_as_their_probability():
  """First choices as often as p says, gates p itself, no expert twice; without a key the largest."""
  router = TopKRouter(4, 3, 2, choose="sampled", rngs=nnx.Rngs(0))
  logit, mask = jnp.broadcast_to(LOGIT_GTE, (4000, 6, 3)), jnp.ones((4000, 6), bool)
  routing = jax.jit(lambda key: router.route(logit, mask, key=key))(jax.random.key(0))
  first, second = np.asarray(routing.expert[:, :6]), np.asarray(routing.expert[:, 6:])
  assert (first != second).all()
  prob_TE = np.asarray(routing.prob[0])
  for e in range(3):
    # Deviation of a share over 4000 draws is at most 0.0079; 18 of them within 4 deviations.
    np.testing.assert_allclose((first == e).mean(0), prob_TE[:, e], atol=0.032)
  np.testing.assert_array_equal(routing.gate[:, :6], prob_TE[np.arange(6), first])
  assert router.route(LOGIT_GTE, MASK_GT).expert[0, :6].tolist() == [0, 2, 0, 0, 1, 0]


# Published forms as fields of `top_k`: the gates of logits l, given the chosen k, and the balance loss.
_ALL = lambda l: np.exp(l) / np.exp(l).sum(-1, keepdims=True)
_OF_ALL = lambda l, chosen: np.take_along_axis(_ALL(l), chosen, -1)
_OF_ALL_RENORMALISED = lambda l, chosen: _OF_ALL(l, chosen) / _OF_ALL(l, chosen).sum(-1, keepdims=True)
_OF_CHOSEN = lambda l, chosen: _ALL(np.take_along_axis(l, chosen, -1))
_COUNT = lambda l, chosen: np.bincount(chosen.ravel(), minlength=l.shape[-1])
# E Σ f P, f the share of first choices: Switch's paper. Mesh, Lingvo and vmoe write mean_e(c_e m_e) E².
_FIRST = lambda l, chosen: (_COUNT(l, chosen[:, :1]) / len(l) * _ALL(l).mean(0)).mean() * l.shape[-1] ** 2
# Hugging Face, Flaxformer: f the share of tokens with e among their choices.
_ANY = lambda l, chosen: l.shape[-1] * (_COUNT(l, chosen) / len(l) * _ALL(l).mean(0)).sum()
# MegaBlocks: E / (T k) Σ tokens_e mean_e; DeepSeekMoE: f = N' / (K' T) Σ_t 1, Σ f P.
_EACH = lambda l, chosen: l.shape[-1] / chosen.size * (_COUNT(l, chosen) * _ALL(l).mean(0)).sum()
FORMS = {  # fields; gates; balance loss, before its weight
    "Switch": (dict(k=1, gate="raw", balance_count="first"), _OF_ALL, _FIRST),
    "GShard, Lingvo": (dict(k=2, gate="renormalized", skip_threshold=0.5, balance_count="first"),
                       _OF_ALL_RENORMALISED, _FIRST),
    "GLaM": (dict(k=2, gate="renormalized", skip_threshold=0.5, balance_count="first",
                  load_balance_weight=1e-2), _OF_ALL_RENORMALISED, _FIRST),
    "ST-MoE": (dict(k=2, gate="renormalized", skip_threshold=0.2, balance_count="first", z_weight=1e-3),
               _OF_ALL_RENORMALISED, _FIRST),
    "V-MoE with its GShard loss, no noise": (dict(k=2, gate="raw", balance_count="first"), _OF_ALL, _FIRST),
    "Flaxformer": (dict(k=2, gate="raw", balance_count="multi_hot"), _OF_ALL, _ANY),
    "OLMoE": (dict(k=8, gate="raw", balance_count="assignments", z_weight=1e-3), _OF_ALL, _EACH),
    "Qwen1.5-MoE, Qwen2-MoE": (dict(k=4, gate="raw", balance_count="multi_hot"), _OF_ALL, _ANY),
    "Qwen3-MoE": (dict(k=8, gate="renormalized", balance_count="multi_hot"), _OF_ALL_RENORMALISED, _ANY),
    "Mixtral": (dict(k=2, gate="renormalized", balance_count="multi_hot"), _OF_ALL_RENORMALISED, _ANY),
    "Mixtral, its paper": (dict(k=2, gate="renormalized", balance_count="multi_hot"), _OF_CHOSEN, _ANY),
    "MaxText": (dict(k=2, gate="renormalized", order="token", balance_count="assignments"), _OF_CHOSEN,
                _EACH),
    "DeepSeekMoE": (dict(k=6, gate="raw", balance_count="assignments"), _OF_ALL, _EACH),
}


@pytest.mark.parametrize("name", FORMS)
def test_published_forms_are_fields_of_top_k(name):
  """Gates in the list's order, and the balance loss, as each writes it: no other router is needed."""
  fields, gates, balance = FORMS[name]
  router = TopKRouter(4, 16, **fields, rngs=nnx.Rngs(0))
  logit_GTE = jax.random.normal(jax.random.key(0), (1, 12, 16))
  routing = jax.jit(lambda logit_GTE: router.route(logit_GTE, jnp.ones((1, 12), bool)))(logit_GTE)
  logit_TE, k = np.asarray(logit_GTE[0], np.float64), fields["k"]
  chosen_TK = np.argsort(-logit_TE, axis=-1)[:, :k]
  in_list = lambda a_TK: a_TK.reshape(-1) if router.order == "token" else a_TK.T.reshape(-1)
  np.testing.assert_array_equal(routing.expert[0], in_list(chosen_TK))
  np.testing.assert_allclose(routing.gate[0], in_list(gates(logit_TE, chosen_TK)), rtol=1e-5)
  np.testing.assert_allclose(routing.losses["load_balance"], (balance(logit_TE, chosen_TK), 1), rtol=1e-5)


def test_a_group_of_one_sequence_has_the_balance_of_the_sequence():
  """What per-sequence forms compute, `group_size` gives: a mean over sequences of each one's own loss."""
  router = TopKRouter(4, 16, 2, balance_count="assignments", rngs=nnx.Rngs(0))
  logit_GTE = jax.random.normal(jax.random.key(0), (3, 12, 16))
  routing = jax.jit(router.route)(logit_GTE, jnp.ones((3, 12), bool))
  own = [_EACH(l, np.argsort(-l, axis=-1)[:, :2]) for l in np.asarray(logit_GTE, np.float64)]
  np.testing.assert_allclose(routing.losses["load_balance"], (sum(own), 3), rtol=1e-5)
