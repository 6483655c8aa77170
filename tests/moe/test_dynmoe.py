"""DynMoE: what is active and what it weighs, the straight-through gradient, a pool that grows and shrinks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router
from sparse_experts.moe.routers.dynmoe import diversity, simplicity

D, E = 3, 4
QUICK = {"xla_backend_optimization_level": 0}
# Cosines with columns along the axes, the fourth slot disabled: 2 active, 1, none, and a vector of zeros.
X_GTD = jnp.array([[[3.0, 4.0, -1.0], [0.0, 0.0, 2.0], [-1.0, -2.0, -2.0], [0.0, 0.0, 0.0]]])
TOKENS = Tokens(mask=jnp.ones((1, 4), bool))


def router(**fields):
  made = make_router("dynmoe", D, E, rngs=nnx.Rngs(0), **({"initial_experts": 3} | fields))
  made.w[...] = jnp.concatenate([jnp.eye(D), jnp.ones((D, 1))], axis=1)
  return made


def dense(routing):
  """Gates, 0 where not valid."""
  found = np.zeros((4, E))
  found[routing.token[0], routing.expert[0]] = jnp.where(routing.valid, routing.gate, 0)[0]
  return found


def state_of(given):
  return nnx.to_pure_dict(nnx.split(given, nnx.Param, ...)[2]), nnx.to_pure_dict(nnx.state(given, nnx.Param))


def test_gates_in_training_and_in_evaluation():
  """Any above the thresholds, evenly; nobody's token gets nothing while training, its best one afterwards."""
  given = router()
  train = jax.jit(lambda key: given(X_GTD, TOKENS, None, key), compiler_options=QUICK)
  trained, evaluated = train(jax.random.key(0)), train(None)
  both = [[0.5, 0.5, 0, 0], [0, 0, 1, 0]]
  np.testing.assert_array_equal(dense(trained), both + [[0] * 4] * 2)
  # Cosines -1/3, -2/3, -2/3, and all 0.
  np.testing.assert_array_equal(dense(evaluated), both + [[1, 0, 0, 0]] * 2)
  np.testing.assert_allclose(trained.stats["unrouted"], X_GTD[0, 2:].sum(0))
  np.testing.assert_array_equal(trained.metrics["load"][0], [1, 1, 1, 0])
  assert trained.expert[0, :4].tolist() == [1, 2, 0, 0], "the best expert of each token claims first"
  np.testing.assert_allclose(trained.metrics["enabled"], (3, 1))


def test_thresholds_are_of_cosines():
  """.588 and .784 of token 0: a threshold of 0.6 leaves one."""
  given = router()
  given.threshold[...] = jnp.array([0.6, 0.6, 0.0, -1.0])
  routing = given(X_GTD, TOKENS, None, jax.random.key(0))
  np.testing.assert_array_equal(dense(routing), [[0, 1, 0, 0], [0, 0, 1, 0], [0] * 4, [0] * 4])


@pytest.mark.parametrize("convention", ["held", "through"])
@pytest.mark.parametrize("group", [[0, 1], [1]], ids=["a token shares", "no token shares"])
def test_the_gradient_is_straight_through(convention, group):
  """dL/ds of active experts: (dL/dw - their mean) / K, or dL/dw / K if K is held; of others nothing.

  As in the authors' DeepSpeed and in their Tutel, which divides only if some token has two experts.
  """
  given = router(count_gradient=convention)
  cotangent_E = np.array([1.0, 5.0, 7.0, 11.0])
  cosine_TE = np.array([[0.6, 0.8, -0.1, 0.9], [-0.1, -0.2, 0.3, 0.1]])

  def weighed(cosine_GTE):
    routing, _ = given.route(cosine_GTE, jnp.ones((1, len(group)), bool), training=True)
    gate_GA = jnp.where(routing.valid, routing.gate, 0)
    return (gate_GA * jnp.asarray(cotangent_E, jnp.float32)[routing.expert]).sum()

  found_TE = jax.jit(jax.grad(weighed), compiler_options=QUICK)(
      jnp.asarray(cosine_TE[group], jnp.float32)[None])[0]
  s_TE = 1 / (1 + np.exp(-cosine_TE))
  active = [[0, 1], [2]]
  expected_TE = np.zeros((2, E))
  through = convention == "through" and 0 in group
  for t in range(2):
    mean = cotangent_E[active[t]].mean() if through else 0.0
    expected_TE[t, active[t]] = (cotangent_E[active[t]] - mean) / len(active[t])
  np.testing.assert_allclose(found_TE, (expected_TE * s_TE * (1 - s_TE))[group], rtol=1e-5, atol=1e-8)
  assert through != bool(expected_TE[1].any()), "one active expert teaches nothing unless K is held"


def test_scores_have_no_temperature_unless_one_is_learned():
  """The scripts' gate, and `gated_multi_gate_t`."""
  plain, learned = router(), router(scale=10.0, train_scale=True)
  assert "log_scale" not in state_of(plain)[1] and "log_scale" in state_of(learned)[1]
  routing = plain(X_GTD, TOKENS, None)
  cosine_E = np.array([3.0, 4.0, -1.0]) / 26**0.5
  score_E = 1 / (1 + np.exp(-cosine_E))
  np.testing.assert_allclose(routing.prob[0, 0, :3], score_E / score_E.sum(), rtol=1e-5)


def test_losses_by_hand():
  """Columns (2, 0), (1, 1), (0, 3): cosines of .707 for neighbours; at first the third is disabled."""
  w_DE = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
  np.testing.assert_allclose(diversity(w_DE, jnp.array([True, True, False])), 1.0, rtol=1e-5)  # 2 times 1/2
  np.testing.assert_allclose(diversity(w_DE, jnp.ones(3, bool)), 2**0.5, rtol=1e-5)
  np.testing.assert_allclose(simplicity(w_DE), (2 + 2**0.5 + 3) / 3, rtol=1e-6)
  orthogonal = jax.grad(lambda w: diversity(w, jnp.ones(2, bool)) + simplicity(w))(2 * jnp.eye(2))
  np.testing.assert_allclose(orthogonal, jnp.eye(2) / 2, atol=1e-5)


def test_losses_do_not_depend_on_how_a_batch_is_cut():
  """Sums and counts of two groups, one of them padding, divide to the figure of the weights."""
  given = router()
  routing = given(jnp.concatenate([X_GTD] * 2), Tokens(mask=jnp.array([[True] * 4, [False] * 4])), None, None)
  for name, value in (("diversity", diversity(given.w[...], given.enabled_E[...])),
                      ("simplicity", simplicity(given.w[...]))):
    np.testing.assert_allclose(routing.losses[name], (value, 1), rtol=1e-6)


def run(given, steps, load, unrouted):
  """The state after steps 0, 1, ...; `load` and `unrouted` say what each was told."""
  state, params = state_of(given)
  step = jax.jit(given.next_state, compiler_options=QUICK)
  for i in range(steps):
    told = {"load": (jnp.asarray(load(i), jnp.float32), jnp.ones(()))}
    state = step(state, params, told, {"unrouted": jnp.asarray(unrouted(i), jnp.float32)})
  return state, params


def test_the_pool_changes_by_what_its_window_recorded():
  """Steps 4 and 5 of 8 count. Expert 1, idle in them, goes; its slot is the first free, and is filled."""
  given = router(update_every=8)
  load = lambda i: [1, 0, 1, 0] if i in (4, 5) else [0, 1, 0, 0]
  unrouted = lambda i: [0.0, 3.0, 4.0] if i == 5 else [0.0] * 3 if i == 4 else [9.0, 0.0, 0.0]
  before, _ = run(given, 5, load, unrouted)
  assert before["enabled_E"].tolist() == [True, True, True, False] and not before["w_offset_DE"].any()
  given.threshold[...] = jnp.array([0.1, 0.2, 0.3, 0.4])
  state, params = run(given, 6, load, unrouted)
  assert state["enabled_E"].tolist() == [True, True, True, False]
  column_DE = params["w"] + state["w_offset_DE"]
  threshold_E = params["threshold"] + state["threshold_offset_E"]
  np.testing.assert_allclose(column_DE[:, 1], [0, 0.6, 0.8], rtol=1e-6)
  np.testing.assert_array_equal(column_DE[:, [0, 2, 3]], params["w"][:, [0, 2, 3]])
  np.testing.assert_allclose(threshold_E, [0.1, 0, 0.3, 0.4], atol=1e-7)
  later, _ = run(given, 12, load, unrouted)
  jax.tree.map(np.testing.assert_array_equal, {**later, "steps": 0}, {
      **state, "steps": 0, "active_E": later["active_E"], "unrouted_D": later["unrouted_D"]})
  nnx.update(given, jax.tree.map(jnp.asarray, {"w_offset_DE": state["w_offset_DE"]}))
  unrouted_GTD, one = jnp.array([[[0.0, 3.0, 4.0]]]), Tokens(mask=jnp.ones((1, 1), bool))
  routing = given(unrouted_GTD, one, None, jax.random.key(0))
  assert (routing.valid & (routing.expert == 1)).any(), "the tokens that had nobody now have the new expert"


@pytest.mark.parametrize("load, unrouted, enabled, renewed", [
    ([1, 1, 1, 0], [0, 0, 0], [1, 1, 1, 0], None),  # all used, nobody left out
    ([1, 1, 1, 0], [0, 0, 2], [1, 1, 1, 1], 3),
    ([0, 1, 0, 0], [0, 0, 0], [0, 1, 0, 0], None),  # two go
    ([0, 1, 0, 0], [0, 0, 2], [1, 1, 0, 0], 0),
    ([0, 0, 0, 0], [0, 0, 2], [1, 0, 0, 0], 0),
    ([0, 0, 0, 0], [0, 0, 0], [1, 1, 1, 0], None),  # nothing was seen
])
def test_who_goes_and_who_comes(load, unrouted, enabled, renewed):
  state, _ = run(router(update_every=4), 4, lambda i: load, lambda i: unrouted)
  np.testing.assert_array_equal(state["enabled_E"], np.array(enabled, bool))
  np.testing.assert_array_equal(state["w_offset_DE"].any(0), np.arange(E) == renewed)


def test_a_full_pool_grows_no_more_and_a_held_one_does_not_change():
  full, _ = run(router(update_every=4, initial_experts=4), 4, lambda i: [1] * 4, lambda i: [0, 0, 2])
  assert full["enabled_E"].all() and not full["w_offset_DE"].any()
  held, _ = run(router(update_every=0), 4, lambda i: [1, 0, 0, 0], lambda i: [0, 0, 2])
  jax.tree.map(np.testing.assert_array_equal, held, state_of(router(update_every=0))[0])


@pytest.mark.parametrize("fields, message", [
    (dict(initial_experts=0), "router.initial_experts=0 is not between 1 and num_experts=4"),
    (dict(initial_experts=5), "router.initial_experts=5 is not between 1 and num_experts=4"),
    (dict(update_every=3), "router.update_every=3 leaves no step to record in; choose 4 or more, or 0 for"),
    (dict(count_gradient="hold"), "router.count_gradient='hold' is unknown; did you mean 'held'"),
    (dict(scale=0.0), "router.scale=0.0 is out of range; choose from above 0 to 100"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
