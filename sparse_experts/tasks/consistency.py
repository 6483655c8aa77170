"""`train.consistency`: two passes of a batch that draw their own noise, and how far they diverge.

THOR (Zuo et al. 2021) with the router `random`: each layer draws an expert in each pass. With dropout alone
it is R-Drop (Liang et al. 2021), the control that says what experts add.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.config import ConfigDict
from sparse_experts.moe.keys import fold

# key -> (logits_...V, nats of each target, times its weight, `sums.layer_sums`)
Pass = Callable[[Any], tuple[Array, Array, dict[str, Any]]]


@jax.named_scope("loss")
def divergence(one: Array, other: Array) -> Array:
  """[KL(p||q) + KL(q||p)] / 2 of the softmax over the last axis of two logits, nats; gradients go to both."""
  log_p, log_q = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (one, other))
  return 0.5 * ((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q)).sum(-1)


@jax.named_scope("loss")
def smoothed(loss: Array, logits: Array, share: float, weight: Array | float) -> Array:
  """The loss, times its weight, if `share` of each target's probability is spread evenly over all values.

  Szegedy et al. 2016, section 7.
  """
  if not share:
    return loss
  return (1 - share) * loss - share * jax.nn.log_softmax(logits.astype(jnp.float32)).mean(-1) * weight


def passes(config: ConfigDict, one_pass: Pass, weight: Array | float, key: Any
           ) -> tuple[Array, dict[str, Any]]:
  """(nats of each target, times its weight; sums of the layers), of two passes with `train.consistency`.

  Of two: the mean of both losses and alpha / 2 of the divergence. That is half of the paper's sum, so that a
  loss stays in nats per target. The layers' losses and loads are of both passes.
  """
  alpha = config.train.consistency
  if not alpha:
    return one_pass(key)[1:]
  (one, loss, layers), (other, other_loss, others) = (one_pass(fold(key, name)) for name in ("one", "other"))
  loss = (loss + other_loss + alpha * divergence(one, other) * weight) / 2
  return loss, jax.tree.map(jnp.add, layers, others)
