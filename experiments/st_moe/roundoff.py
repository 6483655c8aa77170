"""ST-MoE's worked example of bfloat16's grid: rounding of large logits (Zoph et al. 2022, section 3)."""

import jax.numpy as jnp
import numpy as np

from sparse_experts.ledger.verdict import Figure
from sparse_experts.moe.routing import scores

OTHERS, WINNER, NUMBER = 128.0, 128.5, 10  # ten logits of 128 and one of 128.5


def example(path: str, quick: bool) -> list[Figure]:
  """Probabilities of the winner before and after rounding, what it loses, and the grid's spacings.

  An interval is half of the last printed digit either way, as the published numbers are rounded.
  """
  logit_E = jnp.array([*[OTHERS] * NUMBER, WINNER])
  rounded_E = logit_E.astype(jnp.bfloat16).astype(jnp.float32)  # the softmax itself is not in bfloat16
  before, after = (float(scores.softmax(x)[-1]) for x in (logit_E, rounded_E))
  figures = [("winner before rounding", 0.142, before, 3), ("winner after rounding", 0.091, after, 3),
             ("share of its probability lost", 0.36, 1 - after / before, 2)]
  figures += [(f"spacing from {at}", published, spacing(at), digits)
              for at, published, digits in ((2, 0.0156, 4), (32, 0.25, 2), (1024, 8.0, 0))]
  return [Figure(name, published, ours, ours - (half := 0.5 * 10**-digits), ours + half)
          for name, published, ours, digits in figures]


def spacing(at: float) -> float:
  """From `at` to the next number of bfloat16."""
  a = jnp.asarray(at, jnp.bfloat16)
  return float(np.nextafter(np.asarray(a), np.asarray(jnp.inf, jnp.bfloat16)).astype(np.float32)) - float(a)
