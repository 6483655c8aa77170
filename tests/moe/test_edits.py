"""Edits change what they say and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.moe import DISPATCHES, force, reroute
from tests.moe.test_layer import CLOSE, E, make, tokens


def test_reroute_keeps_gates_and_tokens_and_mixes_experts():
  layer, plain = make(k=2, edit=reroute), make(k=2)
  x = tokens(G=1, T=400)
  _, routing = layer(x)
  _, before = plain(x)
  np.testing.assert_array_equal(routing.gate, before.gate)
  expert_TK = routing.expert.reshape(2, 400).T
  assert (expert_TK[:, 0] != expert_TK[:, 1]).all(), "a token's experts stay different"
  # 400 draws over 4 experts: deviation of a share is 0.022; within 4 deviations of a quarter.
  share = jax.nn.one_hot(expert_TK[:, 0], E).mean(0)
  np.testing.assert_allclose(share, 0.25, atol=0.09)


def run(layer, x, edits=None):
  return layer.apply(layer.state, x, None, None, edits)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_force_sends_one_choice_of_one_token_elsewhere(dispatch):
  """Groups of 5 of 2 x 8 tokens: what is wanted is regrouped as tokens are. Gates are renormalised."""
  layer = make(dispatch, k=2, group_size=5, gate="renormalized", edit=functools.partial(force, rank=1))
  x, nothing = tokens(), jnp.full((2, 8), -1, jnp.int32)
  y, before = run(layer, x, nothing)
  token, used = 3, {int(e) for e in before.expert[2, [1, 6]]}  # row 1, place 3: group 2, token 1
  (other, *_) = set(range(E)) - used
  y_forced, after = run(layer, x, nothing.at[1, token].set(other))
  changed = (after.expert != before.expert) | (after.gate != before.gate)
  assert np.argwhere(changed).tolist() == [[2, 6]], "the second choice of that token"
  assert after.token[2, 6] == 1 and after.expert[2, 6] == other
  prob = after.prob[2, 1]
  np.testing.assert_allclose(after.gate[2, 6], prob[other] / prob[jnp.array(sorted(used))].sum(), rtol=1e-5)
  experts = layer.experts
  ffn = lambda e: jax.nn.gelu(x[1, token] @ experts.w_in[...][e]) @ experts.w_out[...][e]
  expected = sum(after.gate[2, a] * ffn(after.expert[2, a]) for a in (1, 6))
  np.testing.assert_allclose(y_forced[1, token], expected, **CLOSE)
  np.testing.assert_allclose(y_forced.at[1, token].set(0), y.at[1, token].set(0), **CLOSE)
  assert jnp.abs(y_forced - y)[1, token].max() > 1e-3


def test_forcing_what_was_chosen_changes_no_bit():
  layer = make(k=2, gate="renormalized", edit=force)
  x = tokens()
  y, routing = run(layer, x, jnp.full((2, 8), -1, jnp.int32))
  first = jnp.take_along_axis(routing.expert, jnp.arange(8)[None], axis=1)
  np.testing.assert_array_equal(run(layer, x, first)[0], y)


def test_a_raw_gate_becomes_the_forced_experts_probability():
  layer = make(edit=force)
  _, routing = run(layer, tokens(), jnp.full((2, 8), 2, jnp.int32))
  np.testing.assert_array_equal(routing.gate, routing.prob[..., 2])


def test_edits_without_an_edit_are_refused():
  with pytest.raises(ValueError, match="the layer has no `edit`"):
    run(make(), tokens(), jnp.zeros((2, 8), jnp.int32))
