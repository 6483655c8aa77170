"""Random routing: who shares a draw, and when another is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.models import build
from sparse_experts.moe import Tokens, make_router
from tests.models.tiny import VOCAB, init, jit, make_batch, tiny

G, T, E = 4, 300, 4
SEQUENCE_GT = jnp.asarray(np.arange(G * T).reshape(G, T) // 6, jnp.int32)  # 200 sequences of 6
TOKENS = Tokens(mask=jnp.ones((G, T), bool), sequence=SEQUENCE_GT)
KEYS = [None, *map(jax.random.key, range(1, 4))]


def draws(draw, key):
  router = make_router("random", 2, E, rngs=nnx.Rngs(0), **{"draw" if key is not None else "eval_draw": draw})
  return np.asarray(router(jnp.zeros((G, T, 2)), TOKENS, None, key).expert)


@pytest.mark.parametrize("draw, own", [("token", G * T), ("sequence", 200)])
def test_a_draw_is_shared_by_what_it_is_for(draw, own):
  """One expert per token or sequence, evenly, and others with another key; without one always the same."""
  found = [draws(draw, key).reshape(own, -1) for key in KEYS]
  for expert in found:
    assert (expert == expert[:, :1]).all()
    # Chi-squared with 3 degrees of freedom below the 0.999 quantile.
    assert ((np.bincount(expert[:, 0], minlength=E) - own / E) ** 2).sum() / (own / E) < 16.3
  for i in range(4):
    for j in range(i):  # agreement by chance is 1 / E; 4 deviations over 200 draws
      assert abs((found[i] == found[j]).mean() - 1 / E) < 4 * np.sqrt(3 / 16 / 200)
  np.testing.assert_array_equal(found[0], draws(draw, None).reshape(own, -1))


def test_a_pass_through_a_layer_has_one_expert():
  found = [draws("layer", jax.random.key(i)) for i in range(30)]
  assert all((expert == expert[0, 0]).all() for expert in found)
  assert {int(expert[0, 0]) for expert in found} == set(range(E))


def test_layers_and_passes_of_a_model_draw_for_themselves():
  """30 layers in two passes: a layer's second expert equals its first, or its neighbour's, by chance only."""
  model = build(tiny(num_layers=30, moe_every=1, router=dict(name="random")), VOCAB)
  params, buffers = init(model)
  load = jit(lambda key: [
      routing.metrics["load"][0] for routing in model.apply(params, buffers, make_batch(), key)[1].values()])
  one, other = (np.argmax(load(jax.random.key(i)), -1) for i in range(2))
  assert (one == other).mean() < 0.6 and (one[1:] == one[:-1]).mean() < 0.6  # 0.25 by chance, deviation 0.08


def test_what_it_depends_on_is_declared():
  """Cached decoding, where places are others than in training, refuses draws that depend on them."""
  causality = lambda **fields: make_router("random", 2, E, rngs=nnx.Rngs(0), **fields).causality
  assert causality() == causality(eval_draw="sequence") == "past"
  assert causality(draw="token", eval_draw="layer") == "past"
  assert causality(eval_draw="layer") == "self"


def test_mistakes_are_named():
  with pytest.raises(UserError, match="router.eval_draw='tokens' is unknown; did you mean 'token'"):
    make_router("random", 2, E, eval_draw="tokens", rngs=nnx.Rngs(0))
  router = make_router("random", 2, E, eval_draw="sequence", rngs=nnx.Rngs(0))
  with pytest.raises(UserError, match="router 'random' draws by sequence, but tokens.sequence is None"):
    router(jnp.zeros((1, 3, 2)), Tokens(mask=jnp.ones((1, 3), bool)), None)
