"""The "+" of COMET+: a soft permutation while its phase lasts, a hard one after it and in evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, MoELayer, Tokens, make_router
from sparse_experts.moe.routers.permuted import BIDS, entropy, soft_permutation
from sparse_experts.moe.routing.auction import auction

D, E, T, STEPS = 6, 8, 32, 4
QUICK = {"xla_backend_optimization_level": 0}
soft = jax.jit(jax.vmap(soft_permutation, (0, None)), compiler_options=QUICK)
hard = jax.jit(lambda plan: auction(plan, jnp.ones(plan.shape[:2], bool), BIDS), compiler_options=QUICK)
KEY = jax.random.key(0)
X_GTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, D)), jnp.float32)
TOKENS = Tokens(mask=jnp.ones((2, T), bool).at[1, 20:].set(False),
                id=jnp.asarray(np.random.default_rng(1).integers(0, 99, (2, T)), jnp.int32))

INNER = {"top_k": dict(k=2, order="token", skip_threshold=1.0), "hash": dict(k=2),
         "dselect_k": dict(k=2, gamma=0.1), "comet": dict(k=2, gamma=0.1)}
each_inner = pytest.mark.parametrize("of", INNER)


def draws(n, number):
  return np.random.default_rng(n).uniform(-0.05, 0.05, (number, n, n)).astype(np.float32)


def slow_plan(logit_EE, temperature, turns):
  log_EE = logit_EE.astype(np.float64) / temperature
  for _ in range(turns):
    log_EE = log_EE - logsumexp(log_EE, axis=1, keepdims=True)
    log_EE = log_EE - logsumexp(log_EE, axis=0, keepdims=True)
  return np.exp(log_EE)


class Case:
  """A router, compiled with and without a key, and its arrays; weights wide, so that gates differ."""

  def __init__(self, of, **arguments):
    self.router = make_router("permuted", D, E, of=of, steps=STEPS, rngs=nnx.Rngs(params=0), **arguments)
    self.graphdef, params, state = nnx.split(self.router, nnx.Param, ...)
    self.params, self.state = nnx.to_pure_dict(params), nnx.to_pure_dict(state)
    if self.params.get("inner"):
      self.params["inner"] = jax.tree.map(lambda a: a * (0.4 / jnp.abs(a).max()), self.params["inner"])
    self.train = jax.jit(functools.partial(self.call, key=KEY), compiler_options=QUICK)
    self.eval = jax.jit(self.call, compiler_options=QUICK)
    self.inner = jax.jit(self.call_inner, compiler_options=QUICK)
    self.next = jax.jit(lambda state, routing: self.router.next_state(
        state, self.params, routing.metrics, routing.stats), compiler_options=QUICK)

  def bind(self, params, state):
    return nnx.merge(self.graphdef, params, state)

  def call(self, params, state, key=None):
    return self.bind(params, state)(X_GTD, TOKENS, None, key)

  def call_inner(self, params, state, key=None):
    return self.bind(params, state).inner(X_GTD, TOKENS, None, key)


@functools.cache
def case(of):
  return Case(of, **INNER[of])


def dense(routing):
  """gate_GTE of what is valid."""
  gate_GTE = np.zeros((2, T, E))
  g, a = np.nonzero(routing.valid)
  np.add.at(gate_GTE, (g, routing.token[g, a], routing.expert[g, a]), routing.gate[g, a])
  return gate_GTE


@pytest.mark.parametrize("n, column, row", [(8, 0.87, 0.19), (16, 0.79, 0.17)])
def test_the_first_plan_is_sharp_with_exact_columns_only(n, column, row):
  """Means measured over 400 other draws; their deviations are below 0.005 and 0.01."""
  plan = np.asarray(soft(draws(n, 400), 0.0))
  np.testing.assert_allclose(plan.sum(1), 1, atol=1e-5)
  assert plan.sum(2).min() >= 1 / n**2 and plan.sum(2).max() <= n
  assert plan.max(1).mean() == pytest.approx(column, abs=0.02)
  assert np.abs(plan.sum(2) - 1).max(1).mean() == pytest.approx(row, abs=0.04)


@pytest.mark.parametrize("n", [8, 16])
def test_a_small_temperature_is_no_permutation(n):
  """At the end of the schedule columns are exact, rows within their bounds and far from 1."""
  plan = np.asarray(soft(draws(n, 100), 1.0))
  np.testing.assert_allclose(plan.sum(1), 1, atol=1e-5)
  assert plan.sum(2).min() >= 1 / n**2 - 1e-6 and plan.sum(2).max() <= n
  is_permutation = np.abs(plan.sum(2) - 1).max(1) < 1e-2
  assert is_permutation.mean() < 0.2


@pytest.mark.parametrize("progress, temperature, turns", [(0.0, 1e-3, 20), (0.25, 1e-4, 52)])
def test_the_schedule(progress, temperature, turns):
  """20 turns at 1e-3, a quarter of the way 52 (of 52.5) at 1e-4; one turn less is something else."""
  logit = draws(8, 10)
  plan = np.asarray(soft(logit, progress))
  expected = np.stack([slow_plan(logit_EE, temperature, turns) for logit_EE in logit])
  less = np.stack([slow_plan(logit_EE, temperature, turns - 1) for logit_EE in logit])
  np.testing.assert_allclose(plan, expected, atol=1e-3)  # L / temperature is 500: float32 is 3e-5 apart
  assert np.abs(plan - less).max() > 5e-3


def test_gradients_of_the_plan():
  """Against differences of the float64 plan, along one direction; finite at the end of the schedule."""
  logit_EE, weight_EE, direction_EE = draws(8, 3)
  total = lambda logit_EE, progress: (soft_permutation(logit_EE, progress) * weight_EE).sum()
  slope = jax.jit(jax.grad(total), compiler_options=QUICK)
  difference = [(slow_plan(logit_EE + h * direction_EE.astype(np.float64), 1e-3, 20) * weight_EE).sum()
                for h in (1e-5, -1e-5)]
  np.testing.assert_allclose((slope(logit_EE, 0.0) * direction_EE).sum(),
                             (difference[0] - difference[1]) / 2e-5, rtol=1e-2)  # second order in h
  assert np.isfinite(slope(logit_EE, 1.0)).all()


def test_entropy_at_its_ends():
  np.testing.assert_allclose(entropy(jnp.eye(E)[::-1]), -2e-6 * E, atol=1e-6)
  np.testing.assert_allclose(entropy(jnp.full((E, E), 1 / E)), 2 * E * np.log(E), rtol=1e-4)  # log's 1e-6
  uneven = jnp.array([[1.0, 1.0], [1e-9, 1e-9]])  # columns are hard, rows are halves
  np.testing.assert_allclose(entropy(uneven), 2 * np.log(2), rtol=1e-4)


@pytest.mark.parametrize("n", [3, 8, 16])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_assignment_is_within_its_bound_of_the_best(n, progress):
  """A permutation, though plans share columns; its sum at most n steps below scipy's."""
  plan = np.asarray(soft(draws(n, 20), progress))
  for plan_EE, expert_E in zip(plan, np.asarray(hard(plan)), strict=True):
    assert sorted(expert_E) == list(range(n))
    best = plan_EE[linear_sum_assignment(-plan_EE)].sum()
    assert plan_EE[np.arange(n), expert_E].sum() >= best - n * max(np.ptp(plan_EE) / BIDS, 1e-4)


def test_what_is_equal_stays_in_order():
  assert hard(jnp.full((1, E, E), 1 / E))[0].tolist() == list(range(E))


@each_inner
def test_soft_gates_are_the_inner_ones_permuted(of):
  """P^T g scaled to the sum of g, in falling order, and the probabilities likewise; inner losses stay."""
  c = case(of)
  routing, inner = c.train(c.params, c.state), c.inner(c.params, c.state, KEY)
  plan_EE = slow_plan(np.asarray(c.params["logit_EE"]), 1e-3, 20)
  mask_GT1 = np.asarray(TOKENS.mask)[..., None]

  def permuted(value_GTE):
    moved = value_GTE @ plan_EE
    return moved * value_GTE.sum(-1, keepdims=True) / np.maximum(moved.sum(-1, keepdims=True), 1e-30)

  np.testing.assert_allclose(dense(routing), permuted(dense(inner)), atol=1e-3)  # float32 of L / temperature
  np.testing.assert_allclose(dense(routing).sum(-1), dense(inner).sum(-1), rtol=1e-5)
  assert (np.diff(np.asarray(routing.gate).reshape(2, E, T), axis=1) <= 0).all()
  assert routing.rows_per_token == E and (routing.prob is None) == (inner.prob is None)
  if inner.prob is not None:
    prob, inner_prob = (np.asarray(r.prob) * mask_GT1 for r in (routing, inner))
    np.testing.assert_allclose(prob, permuted(inner_prob), atol=1e-3)
  np.testing.assert_allclose(routing.metrics["load"][0], (dense(routing) > 0).sum((0, 1)))
  assert set(c.router.loss_weights) == set(inner.losses) | {"permutation_entropy"} - {"z"} | (
      set(c.router.inner.loss_weights))
  for name, pair in inner.losses.items():
    np.testing.assert_array_equal(routing.losses[name], pair)
  total, count = routing.losses["permutation_entropy"]
  np.testing.assert_allclose(total / count, entropy(jnp.asarray(plan_EE, jnp.float32)), rtol=1e-2)


@each_inner
def test_a_hard_permutation_is_the_inner_list_with_other_names(of):
  """In evaluation, and with a key after the phase: then rows that are not valid stand behind it."""
  c = case(of)
  expert_E = np.random.default_rng(0).permutation(E).astype(np.int32)
  for step, call, key in ((0, c.eval, None), (STEPS, c.eval, None), (STEPS, c.train, KEY)):
    inner = c.inner(c.params, c.state, key)
    A = inner.token.shape[1]
    routing = call(c.params, c.state | {"step": jnp.int32(step), "expert_E": jnp.asarray(expert_E)})
    for name in ("token", "gate", "valid"):
      np.testing.assert_array_equal(getattr(routing, name)[:, :A], getattr(inner, name))
    np.testing.assert_array_equal(routing.expert[:, :A], expert_E[inner.expert])
    assert not routing.valid[:, A:].any()
    assert routing.rows_per_token == routing.token.shape[1] // T
    np.testing.assert_array_equal(np.sort(routing.token[0]), np.repeat(range(T), routing.rows_per_token))
    for name in ("entropy", "confidence"):
      np.testing.assert_allclose(routing.metrics[name], inner.metrics[name], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(routing.metrics["load"][0])[expert_E], inner.metrics["load"][0])
    np.testing.assert_allclose(routing.losses["permutation_entropy"][0] / 52, -2e-6 * E, atol=1e-6)
    if inner.prob is not None:
      np.testing.assert_allclose(routing.prob[..., expert_E], inner.prob, rtol=1e-6)


def test_the_phase_ends_once():
  """Steps are counted; each of the phase's fixes the permutation of its plan, and nothing later moves it."""
  c = case("comet")
  state, params = c.state, dict(c.params)
  assert state["expert_E"].tolist() == list(range(E)) and state["step"] == 0
  seen = []
  for i in range(STEPS):
    params["logit_EE"] = jnp.asarray(draws(E, STEPS)[i])
    routing = c.train(params, state)
    assert routing.valid.sum() > 2 * 52  # still soft
    state = c.next(state, routing)
    assert int(state["step"]) == i + 1
    plan_EE = np.asarray(soft(params["logit_EE"][None], i / STEPS)[0])
    best = plan_EE[linear_sum_assignment(-plan_EE)].sum()
    assert plan_EE[np.arange(E), state["expert_E"]].sum() >= best - E * max(np.ptp(plan_EE) / BIDS, 1e-4)
    seen.append(state["expert_E"].tolist())
  assert seen[-1] != seen[-2] and sorted(seen[-1]) == list(range(E))

  fixed = c.train(params, state)
  assert fixed.valid.sum() <= 2 * 52 + 52  # few splits of gamma 0.1 are soft
  params["logit_EE"] = -3 * params["logit_EE"]  # momentum, weight decay
  moved = c.train(params, state)
  jax.tree.map(np.testing.assert_array_equal, moved, fixed)
  later = c.next(state, moved)
  assert later["expert_E"].tolist() == seen[-1] and int(later["step"]) == STEPS + 1


def test_gradients_reach_the_permutation_in_its_phase_only():
  c = case("comet")

  def objective(params, state, key=KEY):
    routing = c.call(params, state, key)
    value_GA = jnp.where(routing.valid, routing.gate * jnp.cos(routing.expert.astype(jnp.float32)), 0.0)
    losses = sum(weight * routing.losses[name][0] for name, weight in c.router.loss_weights.items())
    return value_GA.sum() + losses

  slope = jax.jit(jax.grad(objective), compiler_options=QUICK)
  early, late = (slope(c.params, c.state | {"step": jnp.int32(step)}) for step in (0, STEPS))
  assert np.isfinite(early["logit_EE"]).all() and np.abs(early["logit_EE"]).max() > 0
  assert not np.asarray(late["logit_EE"]).any()
  assert all(np.asarray(g).any() for grads in (early, late) for g in jax.tree.leaves(grads["inner"]))


@pytest.mark.slow
def test_layers_side_by_side():
  """`next_state` under vmap, one layer in its phase and one behind it.

  The plan is one on which the auction's usual 50 steps are not enough.
  """
  c = case("comet")
  plan_EE = np.random.default_rng(26).integers(0, 101, (E, E)).astype(np.float32) / 100
  routing = c.train(c.params, c.state)
  plan = jnp.stack([plan_EE, plan_EE])
  state = jax.tree.map(lambda a: jnp.stack([a, a]), c.state) | {"step": jnp.array([0, STEPS], jnp.int32)}
  stats = jax.tree.map(lambda a: jnp.stack([a, a]), routing.stats) | {"plan_EE": plan}
  new = jax.vmap(lambda state, stats: c.router.next_state(state, {}, routing.metrics, stats))(state, stats)
  best = plan_EE[linear_sum_assignment(-plan_EE)].sum()
  np.testing.assert_allclose(plan_EE[np.arange(E), new["expert_E"][0]].sum(), best, atol=8.1e-3)  # E / 1000
  assert new["expert_E"][1].tolist() == list(range(E))


def test_an_inner_state_goes_on_by_the_inner_load():
  """DeepSeek's biases: of experts as the inner router numbers them."""
  c = Case("deepseek_v3", k=2)
  expert_E = jnp.asarray(np.random.default_rng(2).permutation(E), jnp.int32)
  state = c.state | {"step": jnp.int32(STEPS), "expert_E": expert_E}
  routing = c.train(c.params, state)
  new = c.next(state, routing)
  load_E = np.asarray(routing.metrics["load"][0])[np.asarray(expert_E)]
  np.testing.assert_allclose(new["inner"]["bias_E"], 1e-3 * np.sign(load_E.mean() - load_E), rtol=1e-6)
  assert new["expert_E"].tolist() == expert_E.tolist()


def test_experts_may_be_relabelled():
  """Experts in another order with a permutation that knows it: the same outputs and losses."""
  c = case("comet")
  experts = Experts(E, D, 5, "gelu", init_scale=4.0, rngs=nnx.Rngs(2))
  order = np.random.default_rng(3).permutation(E)
  other = nnx.merge(nnx.graphdef(experts), jax.tree.map(lambda w: w[order], nnx.state(experts)))

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(experts_state, expert_E, key):
    layer = MoELayer(c.bind(c.params, c.state | {"step": jnp.int32(STEPS), "expert_E": expert_E}),
                     nnx.merge(nnx.graphdef(experts), experts_state))
    y_GTD, routing = layer(X_GTD, TOKENS, key)
    return y_GTD, routing.losses

  y, losses = run(nnx.state(experts), jnp.arange(E, dtype=jnp.int32), KEY)
  again, same = run(nnx.state(other), jnp.asarray(np.argsort(order), jnp.int32), KEY)
  np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-5)  # rows are summed by expert, in another order
  jax.tree.map(np.testing.assert_array_equal, losses, same)
  assert not np.allclose(run(nnx.state(other), jnp.arange(E, dtype=jnp.int32), KEY)[0], y, atol=1e-2)


@pytest.mark.parametrize("fields, message", [
    (dict(of="permuted"), "router.of='permuted' is no router to permute"),
    (dict(of="comett"), "router.of='comett' is no router to permute; did you mean 'comet'?"),
    (dict(steps=0), "router.steps=0 is out of range; choose 1 or more, or router.name='top_k' alone"),
    (dict(of="comet", jitter=0.1), "router.jitter is set, but router.name='comet' takes no such argument"),
    (dict(of="expert_choice"), "router.of='expert_choice' lists tokens a varying number of times"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    given = make_router("permuted", D, E, rngs=nnx.Rngs(params=0), **fields)
    jax.eval_shape(lambda x: given(x, TOKENS, None), X_GTD)
