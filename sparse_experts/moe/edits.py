"""Changes to a routing between router and dispatch, for experiments on a trained model.

An edit is a function Routing -> Routing, or (Routing, arrays) -> Routing with arrays [G, T], which are passed
per layer by `model.apply(..., edits={layer: arrays [B, L]})`. `build(config, ..., edit=f)` sets the edit of
every sparse layer. Losses and metrics stay the router's.
"""

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.routing import Routing


def reroute(routing: Routing) -> Routing:
  """Sends tokens to random experts, with the same list and gates; a token's experts stay different ones.

  All experts of a token are shifted by one random number (mod E), the same in every batch. If the loss
  hardly rises with this as a layer's `edit`, experts are not specialised.
  """
  num_experts = routing.metrics["load"][0].shape[-1]
  G, A = routing.token.shape
  shift = jax.random.randint(jax.random.key(0), (G, A), 0, num_experts)  # one per token, read by its index
  shift_GA = jnp.take_along_axis(shift, routing.token % A, axis=1)
  return routing.replace(expert=(routing.expert + shift_GA) % num_experts)


def force(routing: Routing, expert_GT: Array, rank: int = 0) -> Routing:
  """Sends each token's choice number `rank` to expert_GT instead; where that is negative, nothing changes.

  The forced expert's gate is its probability times the factor between gate and probability of the replaced
  expert (1 for raw gates, 1 over the sum of the token's k for renormalised ones). The gates of the token's
  other choices stay: only one assignment changes. Forcing the chosen expert changes no bit. Without
  `routing.prob` the gate stays, too.
  """
  wanted_GA = jnp.take_along_axis(expert_GT, routing.token, axis=1)
  changes_GA = (wanted_GA >= 0) & (wanted_GA != routing.expert) & (routing.ranks() == rank)
  gate_GA = routing.gate
  if routing.prob is not None:
    group_G1 = jnp.arange(routing.token.shape[0], dtype=jnp.int32)[:, None]
    prob_of = lambda expert_GA: routing.prob[group_G1, routing.token, expert_GA]
    old_GA = prob_of(routing.expert)
    scale_GA = jnp.where(old_GA > 0, gate_GA / old_GA, 1.0)
    gate_GA = jnp.where(changes_GA, prob_of(jnp.maximum(wanted_GA, 0)) * scale_GA, gate_GA)
  return routing.replace(expert=jnp.where(changes_GA, wanted_GA, routing.expert), gate=gate_GA)
