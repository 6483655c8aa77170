"""What rewards a router that learns from the tokens' losses gets."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sparse_experts.tasks import sums


@dataclasses.dataclass
class Said:
  log_prob: object
  value: object


BATCH = {
    "weights": jnp.array([[1.0, 1.0, 1.0, 0.0]]), "segments": jnp.array([[1, 1, 2, 0]]),
    "encoder_segments": jnp.array([[1, 2, 2, 3, 0]])}
CE = jnp.array([[1.0, 3.0, 5.0, 9.0]])


def test_an_encoders_reward_is_its_sequences():
  """Minus 2 for sequence 1, minus 5 for sequence 2; sequence 3 has no target, and 0 is padding."""
  said = Said(jnp.full((1, 5), -1.0), jnp.zeros((1, 5)))
  found = sums.token_rewards("encoder/01", said, CE, BATCH)
  np.testing.assert_allclose(found["policy"], (-(2.0 + 5.0 + 5.0), 3))


def test_a_decoders_reward_is_its_tokens():
  said = Said(jnp.full((1, 4), -1.0), jnp.zeros((1, 4)))
  found = sums.token_rewards("decoder/01", said, CE, BATCH)
  np.testing.assert_allclose(found["policy"], (-(1.0 + 3.0 + 5.0), 3))


def test_others_get_none():
  assert sums.token_rewards("decoder/01", Said(None, None), CE, BATCH) == {}
