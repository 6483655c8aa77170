"""A frozen router routes as its inner one does at first, and nothing but the inner one's state changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.config import ROUTERS
from sparse_experts.errors import UserError
from sparse_experts.models import describe
from sparse_experts.moe import Tokens, make_router
from sparse_experts.moe.routers.frozen import LINEAR
from tests.models.tiny import VOCAB, tiny

D, E = 6, 4
X_GTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, D)), jnp.float32)
TOKENS = Tokens(mask=jnp.ones((2, 8), bool), task=jnp.zeros((2, 8), jnp.int32))


def make(name, **arguments):
  return make_router(name, D, E, rngs=nnx.Rngs(params=0), **arguments)


@pytest.mark.parametrize("name", LINEAR)
def test_it_is_the_inner_router_without_parameters(name):
  frozen, inner = make("frozen", of=name), make(name)
  assert not jax.tree.leaves(nnx.state(frozen, nnx.Param))
  key = jax.random.key(1)
  for a, b in zip(jax.tree.leaves(frozen(X_GTD, TOKENS, None, key)),
                  jax.tree.leaves(inner(X_GTD, TOKENS, None, key)), strict=True):
    np.testing.assert_array_equal(a, b)
  for field in ("k", "causality", "drop_causality", "most_experts", "reads_padding"):
    assert getattr(frozen, field) == getattr(inner, field)
  assert frozen.loss_weights == inner.loss_weights and frozen.fixed_weights == D * E


@pytest.mark.parametrize("name", LINEAR)
def test_what_else_the_inner_ones_learn_starts_at_zero(name):
  """So that nothing but W is random, and no row of scores is all alike."""
  params = nnx.to_pure_dict(nnx.state(make(name), nnx.Param))
  assert params.pop("w").std() > 0 and not any(np.asarray(a).any() for a in params.values())


def test_the_bias_moves_and_the_weights_do_not():
  given = make("frozen", of="deepseek_v3", bias_rate=0.5)
  state = nnx.to_pure_dict(nnx.state(given))
  load = jnp.array([4.0, 1.0, 2.0, 1.0]), jnp.array(8.0)
  new = given.next_state(state, {}, {"load": load}, {})
  np.testing.assert_array_equal(new["inner"]["w"], state["inner"]["w"])
  np.testing.assert_allclose(new["inner"]["bias_E"], [-0.5, 0.5, 0.0, 0.5])


def test_tokens_still_have_a_gradient():
  given = make("frozen")
  slope_GTD = jax.grad(lambda x_GTD: given(x_GTD, TOKENS, None).gate.sum())(X_GTD)
  assert np.abs(slope_GTD).max() > 1e-4


def test_flops_are_those_of_the_learned_router():
  """The product with W is made for every token, though W is no parameter."""
  frozen, learned = (describe(tiny(router=router), VOCAB) for router in (dict(name="frozen"), {}))
  for figure in ("flops", "executed_flops"):
    assert frozen[figure] == learned[figure]
  assert learned["params_total"] - frozen["params_total"] == 2 * 16 * 4  # two sparse layers


@pytest.mark.parametrize("of", ["permuted", "noisy_top_k", "hash"])
def test_what_has_no_random_matrix_is_refused(of):
  assert of in ROUTERS
  with pytest.raises(UserError, match=f"router.of='{of}' has no random matrix to hold; choose from top_k, "):
    make("frozen", of=of)
