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


@pytest.mark.parametrize("fields, message", [
    (dict(k=4), "router.k=4 is not between 1 and num_experts=3"),
    (dict(dim=0), "router.dim=0 leaves no direction; choose 1 or more"),
    (dict(temperature=0.0), "router.temperature=0.0 is less than 0.01, where it cannot learn"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
