"""X-MoE: scores know directions only, are bounded by the inverse temperature, and the temperature learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router

D, E, J = 5, 3, 2
MASK_GT = jnp.ones((2, 8), bool)


def router(**fields):
  return make_router("cosine", D, E, rngs=nnx.Rngs(0), **dict(dim=J, temperature=0.25) | fields)


def draw(scale=1.0):
  return scale * jax.random.normal(jax.random.key(0), (2, 8, D))


def test_probabilities_are_a_softmax_of_cosines():
  given = router()
  routing = jax.jit(lambda x: given(x, Tokens(mask=MASK_GT), None))(draw())
  low, expert = np.asarray(draw()) @ np.asarray(given.w[...]), np.asarray(given.w_expert[...])
  cosine = low @ expert / np.linalg.norm(low, axis=-1, keepdims=True) / np.linalg.norm(expert, axis=0)
  prob = np.exp(4 * cosine)
  prob /= prob.sum(-1, keepdims=True)
  np.testing.assert_allclose(routing.prob, prob, rtol=1e-5)
  np.testing.assert_array_equal(routing.expert, prob.argmax(-1))
  np.testing.assert_allclose(routing.gate, prob.max(-1), rtol=1e-5)


def test_lengths_of_tokens_and_experts_do_not_matter():
  """Where a linear router's probabilities would become all or nothing."""
  given = router()
  score = given.score(draw())
  np.testing.assert_allclose(given.score(draw(1000.0)), score, rtol=1e-4, atol=1e-5)
  given.w_expert[...] = given.w_expert[...] * jnp.array([[1.0, 10.0, 100.0]])
  np.testing.assert_allclose(given.score(draw()), score, rtol=1e-4, atol=1e-5)
  assert np.abs(score).max() <= 4 + 1e-5


def test_the_temperature_learns_and_is_bounded():
  given = router()
  graphdef, state = nnx.split(given)
  colder = lambda state: nnx.merge(graphdef, state)(draw(), Tokens(mask=MASK_GT), None).gate.sum()
  assert jax.jit(jax.grad(colder))(state)["log_scale"][...] > 0  # a colder winner gets more
  given.log_scale[...] = jnp.array(50.0)
  assert 90 < np.abs(given.score(draw())).max() <= 100 + 1e-3


COSINE_GTE = jnp.array([[[0.6, 0.2, -0.3, 0.1], [0.5, 0.4, 0.0, -0.2], [-0.1, 0.7, 0.2, 0.3]]])


@pytest.mark.parametrize("gate_function, loss", [("softmax", 1.605246), ("sigmoid", 2.131793)])
def test_golden_the_balance_loss_does_not_know_the_learned_temperature(gate_function, loss):
  """0.3 or 0.07 are its own. The router cannot lower it by raising the learned one, as it could before."""
  given = make_router("cosine", D, 4, rngs=nnx.Rngs(0), gate_function=gate_function)

  def balance(state):
    router = nnx.merge(nnx.graphdef(given), state)
    return router.route(router.scale * COSINE_GTE, jnp.ones((1, 3), bool)).losses["load_balance"][0]

  for log_scale in (-1.0, 0.0, 3.0):
    given.log_scale[...] = jnp.asarray(log_scale)
    value, slope = jax.value_and_grad(balance)(nnx.state(given))
    np.testing.assert_allclose(value, loss, rtol=2e-6)
    np.testing.assert_allclose(slope["log_scale"][...], 0, atol=1e-6)


def test_the_sigmoid_gate_is_of_each_expert_alone():
  """The same choices as with the softmax gate; the probabilities, for analysis, stay a softmax."""
  soft, sigmoid = (router(k=2, gate_function=name) for name in ("softmax", "sigmoid"))
  mask_GT = jnp.ones((1, 3), bool)
  logit_GTE = soft.scale * COSINE_GTE[..., :3]
  ours, theirs = sigmoid.route(logit_GTE, mask_GT), soft.route(logit_GTE, mask_GT)
  np.testing.assert_array_equal(ours.expert, theirs.expert)
  np.testing.assert_array_equal(ours.prob, theirs.prob)
  # Over a temperature of 0.25: first choices .6 .5 .7, second ones .2 .4 .2.
  np.testing.assert_allclose(ours.gate[0], 1 / (1 + np.exp(-4 * np.array([0.6, 0.5, 0.7, 0.2, 0.4, 0.2]))),
                             rtol=1e-5)


def test_the_routing_width_is_half_the_experts():
  assert make_router("cosine", D, 8, rngs=nnx.Rngs(0)).w.shape == (D, 4)
  assert make_router("cosine", D, 1, rngs=nnx.Rngs(0)).w.shape == (D, 1)


@pytest.mark.parametrize("fields, message", [
    (dict(k=4), "router.k=4 is not between 1 and num_experts=3"),
    (dict(gate_function="relu"), "router.gate_function='relu' is unknown"),
    (dict(dim=0), "router.dim=0 leaves no direction; choose 1 or more"),
    (dict(temperature=0.0), "router.temperature=0.0 is less than 0.01, where it cannot learn"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
