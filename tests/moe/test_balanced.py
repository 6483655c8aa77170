"""BASE's auction against the Hungarian algorithm; Sinkhorn's marginals; both golden toys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.models import build
from sparse_experts.moe import Experts, MoELayer, Tokens, make_router
from sparse_experts.moe.routing.auction import STEPS, auction
from sparse_experts.moe.routing.transport import sinkhorn
from tests.models.tiny import VOCAB, init, jit, make_batch, tiny
from tests.moe.test_routers import LOGIT_GTE, MASK_GT, PRINTED

assign = jax.jit(auction)


def best_sum(score_TE, places):
  """The largest sum with at most `places` tokens per expert."""
  wide = np.repeat(np.asarray(score_TE), places, axis=1)
  return wide[scipy.optimize.linear_sum_assignment(wide, maximize=True)].sum()


def scores(kind, T, E, groups=6):
  rng = np.random.default_rng([T, E])
  draw = {"normal": lambda: rng.normal(size=(groups, T, E)), "equal": lambda: np.zeros((groups, T, E)),
          "whole": lambda: rng.integers(0, 3, (groups, T, E)),
          "one expert": lambda: rng.normal(size=(groups, T, E)) + 10 * (np.arange(E) == 1),
          "alike": lambda: rng.normal(size=(groups, 1, E)) + 1e-3 * rng.normal(size=(groups, T, E))}
  return draw[kind]().astype(np.float32)


KINDS = "normal", "equal", "whole", "one expert", "alike"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, E", [(6, 3), (24, 4), (64, 8)])
def test_the_auction_is_balanced_and_near_the_best(kind, T, E):
  score_GTE = scores(kind, T, E)
  expert_GT = np.asarray(assign(jnp.asarray(score_GTE), jnp.ones(score_GTE.shape[:2], bool)))
  for score_TE, expert_T in zip(score_GTE, expert_GT, strict=True):
    assert (np.bincount(expert_T, minlength=E) == T // E).all()
    assert_near_the_best(score_TE, expert_T, T // E)


def assert_near_the_best(score_TE, expert_T, places):
  n = len(score_TE)
  eps = max((score_TE.max() - score_TE.min()) / STEPS, 1e-4)
  assert score_TE[np.arange(n), expert_T].sum() >= best_sum(score_TE, places) - n * eps


@pytest.mark.parametrize("kind", KINDS)
def test_places_that_stay_free(kind):
  """Of 24 tokens are real 24, 22, 18, 9, 1 and none, where four experts have 6, 6, 5, 3, 1 and 0 places."""
  score_GTE, real_G, T, E = scores(kind, 24, 4), (24, 22, 18, 9, 1, 0), 24, 4
  mask_GT = np.stack([np.random.default_rng(n).permutation(T) < n for n in real_G])
  expert_GT = np.asarray(assign(jnp.asarray(score_GTE), jnp.asarray(mask_GT)))
  assert not expert_GT[~mask_GT].any()
  for score_TE, expert_T, mask_T, n in zip(score_GTE, expert_GT, mask_GT, real_G, strict=True):
    assert np.bincount(expert_T[mask_T], minlength=E).max() <= -(-n // E)
    if n:
      assert_near_the_best(score_TE[mask_T], expert_T[mask_T], -(-n // E))


def test_a_group_is_the_same_in_any_company():
  """A group that is done early stays as it is while others go on; on a mesh it has other company."""
  easy, hard = scores("alike", 24, 4, groups=2), scores("whole", 24, 4, groups=4)
  mask_GT = np.ones((6, 24), bool)
  together = assign(jnp.concatenate([easy, hard]), jnp.asarray(mask_GT))
  np.testing.assert_array_equal(together[:2], assign(jnp.asarray(easy), jnp.asarray(mask_GT[:2])))


def test_few_tokens_of_many_experts():
  """Three tokens of one taste and five experts: one place each."""
  score_GTE = np.tile(np.float32([4, 3, 2, 1, 0]), (1, 3, 1))
  expert_T = np.asarray(assign(jnp.asarray(score_GTE), jnp.ones((1, 3), bool)))[0]
  assert sorted(expert_T) == [0, 1, 2]


@pytest.mark.slow
def test_tokens_that_are_alike_take_few_rounds():
  """64 of them took 157 rounds of bids that began at prices of 0; `sort` is called once a round."""
  rounds = []
  with pytest.MonkeyPatch.context() as patch:
    sort = jax.lax.sort
    patch.setattr(jax.lax, "sort", lambda *args, **kwargs: rounds.append(0) or sort(*args, **kwargs))
    with jax.disable_jit():
      auction(jnp.asarray(scores("alike", 64, 8, groups=1)), jnp.ones((1, 64), bool))
  assert len(rounds) <= 10


def test_padding_takes_no_place():
  """Five real tokens of eight and three experts: two places each, nothing of the padding's scores."""
  score_GTE = scores("normal", 8, 3, groups=4)
  mask_GT = np.zeros((4, 8), bool)
  mask_GT[:, [0, 2, 3, 5, 6]] = True
  score_GTE[~mask_GT] = np.nan
  expert_GT = np.asarray(assign(jnp.asarray(score_GTE), jnp.asarray(mask_GT)))
  for score_TE, expert_T, mask_T in zip(score_GTE, expert_GT, mask_GT, strict=True):
    real_TE, real_T = score_TE[mask_T], expert_T[mask_T]
    assert np.bincount(real_T, minlength=3).max() == 2
    assert_near_the_best(real_TE, real_T, 2)


def test_scores_that_are_not_finite_count_as_the_smallest():
  score_GTE = scores("normal", 8, 2, groups=1)
  score_GTE[0, 0] = (np.nan, 0.0)
  score_GTE[0, 1] = (0.0, -np.inf)
  expert_T = np.asarray(assign(jnp.asarray(score_GTE), jnp.ones((1, 8), bool)))[0]
  assert (np.bincount(expert_T) == 4).all()
  assert expert_T[0] == 1 and expert_T[1] == 0


def test_golden_assignment():
  """Objective 9.6; the runner-up has 9.3."""
  router = make_router("base", 4, 3, rngs=nnx.Rngs(0))
  trained = router.route(LOGIT_GTE, MASK_GT, key=jax.random.key(0))
  assert trained.expert.tolist() == [[0, 2, 0, 1, 1, 2]]
  np.testing.assert_allclose(trained.gate[0], 1 / (1 + np.exp(-np.array([2.1, 2, 3, 0, 1.5, 1]))), rtol=1e-6)
  assert router.route(LOGIT_GTE, MASK_GT).expert.tolist() == [[0, 2, 0, 0, 1, 0]]  # greedy without a key
  np.testing.assert_array_equal(trained.metrics["load"][0], [2, 2, 2])


def test_golden_plan():
  plan = np.asarray(jax.jit(lambda l, m: sinkhorn(l, m, max_rounds=1000))(LOGIT_GTE, MASK_GT))[0]
  assert plan.argmax(-1).tolist() == [0, 2, 0, 1, 1, 0]
  # Rows are within 0.1%, so are their entries.
  np.testing.assert_allclose(plan[5], [0.088015, 0.017194, 0.061458], rtol=2e-3)


def test_a_cold_plan_is_the_balanced_assignment():
  router = lambda temperature: make_router(
      "sinkhorn", 4, 3, temperature=temperature, max_rounds=20_000, rngs=nnx.Rngs(0))
  for temperature, expert in ((0.28, 0), (0.26, 2)):
    routing = router(temperature).route(LOGIT_GTE, MASK_GT, key=jax.random.key(0))
    assert routing.expert.tolist() == [[0, 2, 0, 1, 1, expert]]
    np.testing.assert_allclose(routing.gate[0, 0], 0.687131, atol=PRINTED)


def test_marginals():
  logit_GTE, mask_GT = scores("normal", 12, 4, groups=3), np.ones((3, 12), bool)
  mask_GT[1, 7:] = False
  mask_GT[2] = False
  plan_GTE = np.asarray(sinkhorn(jnp.asarray(logit_GTE), jnp.asarray(mask_GT)))
  assert not plan_GTE[~mask_GT].any()
  for plan_TE, mask_T in zip(plan_GTE[:2], mask_GT[:2], strict=True):
    np.testing.assert_allclose(plan_TE.sum(0), 1 / 4, rtol=1e-5)
    np.testing.assert_allclose(plan_TE[mask_T].sum(1), 1 / mask_T.sum(), rtol=2e-3)


def test_base_scores_the_stream_as_fairseq():
  """Lists and gates are of what the block adds to, outputs of the experts' own input, by groups."""
  router = make_router("base", 5, 4, score_input="stream", rngs=nnx.Rngs(0))
  experts = Experts(4, 5, 7, "gelu", rngs=nnx.Rngs(1))
  layer = MoELayer(router, experts, "scatter", group_size=8)
  x_BLD, stream_BLD = jax.random.normal(jax.random.key(0), (2, 4, 6, 5))
  tokens = Tokens(mask=jnp.ones((4, 6), bool).at[1, 2].set(False))
  y_BLD, routing = layer(x_BLD, tokens, stream_GTD=stream_BLD.at[1, 2].set(jnp.nan))
  score_NE = jnp.where(tokens.mask[..., None], stream_BLD, 0).reshape(24, 5) @ router.w[...]
  best_N = score_NE.argmax(-1)
  np.testing.assert_array_equal(routing.expert.reshape(-1), best_N)
  every_END = experts.batched(jnp.broadcast_to(x_BLD.reshape(1, 24, 5), (4, 24, 5)))
  expected_ND = jax.nn.sigmoid(score_NE.max(-1))[:, None] * every_END[best_N, jnp.arange(24)]
  expected_BLD = jnp.where(tokens.mask[..., None], expected_ND.reshape(4, 6, 5), 0)
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-5, atol=1e-6)
  with pytest.raises(UserError, match=r"give layer\(x, stream_GTD=...\), or set router.score_input=normed"):
    layer(x_BLD, tokens)


@pytest.mark.slow
def test_blocks_give_the_stream():
  """A norm takes the stream's scale away, the scores of the stream keep it."""
  config = tiny("seq2seq", num_layers=1, moe_every=1, num_experts=4).unlock()
  config.model.decoder.router.name, config.model.router.name = "top_k", "base"
  logit = {}
  for score_input in ("normed", "stream"):
    config.model.router.score_input = score_input
    model = build(config, VOCAB)
    params, buffers = init(model)
    apply = jit(functools.partial(model.apply, trace=True))
    without_attention = lambda path, x: 0 * x if "attention" in str(path) and "out" in str(path) else x
    params = jax.tree_util.tree_map_with_path(without_attention, params)
    for scale in (1.0, 3.0):
      scaled = params | {"embedding": jax.tree.map(lambda x, scale=scale: scale * x, params["embedding"])}
      routing = apply(scaled, buffers, make_batch())[1]["encoder/00"]
      logit[score_input, scale] = jax.scipy.special.logit(routing.gate)[routing.valid]
  # But for the norm's eps.
  np.testing.assert_allclose(logit["normed", 3.0], logit["normed", 1.0], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(logit["stream", 3.0], 3 * logit["stream", 1.0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments, message", [
    (dict(temperature=0.0), "router.temperature=0.0 is out of range; choose a number above 0"),
    (dict(max_rounds=0), "router.max_rounds=0 is out of range; choose 1 or more")])
def test_mistakes(arguments, message):
  with pytest.raises(UserError, match=message):
    make_router("sinkhorn", 4, 3, rngs=nnx.Rngs(0), **arguments)
