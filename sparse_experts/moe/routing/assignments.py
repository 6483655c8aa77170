"""What a router returns: a list of assignments (token, expert, gate) in priority order, and statistics."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from sparse_experts.moe.routing.statistic import Loss, Pair

# For arrays that are there wherever they are read: the layer sets the mask; mixtures have no list, and train
# steps drop it.
ABSENT: Any = None


class Tokens(struct.PyTreeNode):
  """What a router may know about tokens besides their vectors; each field is [G, T] or None."""

  mask: Array = ABSENT  # bool, True where real; padding takes no slot and enters no statistic
  id: Array | None = None  # vocabulary ids
  sequence: Array | None = None  # which sequence of the batch
  task: Array | None = None  # domain, language, modality, ...


class Routing(struct.PyTreeNode):
  """A assignments per group, in the order in which they claim slots.

  Token choice has A = T * K, expert choice A = E * C: any list works with any dispatch. `losses` and
  `metrics` hold (sum, count) pairs over groups with real tokens and over tokens; a loss over the whole batch
  may be a `Statistic`. `rows_per_token` = K promises that each token of a group appears exactly K times
  (`valid` or not): rows are then moved by gathers in both directions, and sums have a fixed order. `order`
  promises where these stand, as `order_assignments` puts them: no sort has to find them. `prob` is for
  analysis (`trace`, regret); a router without probabilities leaves it None. Training keeps neither `prob` nor
  the list.

  A router that learns from rewards returns `log_prob` and `value` for `losses.reward`; the layer gives
  them the shape of its input's first two axes.
  """

  token: Array = ABSENT  # int32 _GA, index within the group
  expert: Array = ABSENT  # int32 _GA
  gate: Array = ABSENT  # float32 _GA, weight of the expert's output in the token's sum
  valid: Array = ABSENT  # bool _GA, False for padding and for choices the policy skipped
  kept: Array = ABSENT  # bool _GA, set by the layer: valid and given a slot
  seed: Array | None = None  # uint32 _GA, names the row on any mesh; set by the layer, for expert dropout
  losses: dict[str, Loss] = struct.field(default_factory=dict)
  metrics: dict[str, Pair] = struct.field(default_factory=dict)
  stats: dict[str, Array] = struct.field(default_factory=dict)  # sums of any shape, for `next_state` alone
  log_prob: Array | None = None  # float32 _GT, of the token's choices; 0 for padding
  value: Array | None = None  # float32 _GT, the reward that the router expects
  prob: Array = ABSENT  # float32 _GTE, the router's probability of every expert
  rows_per_token: int | None = struct.field(pytree_node=False, default=None)
  order: str | None = struct.field(pytree_node=False, default=None)
  # Of the list, the part that is usually valid; layouts reserve rows for it.
  expected_fraction: float = struct.field(pytree_node=False, default=1.0)

  @property
  def expected_rows(self) -> int:
    """How many assignments of all groups are usually valid."""
    return math.ceil(self.token.size * self.expected_fraction)

  def ranks(self) -> Array:
    """The number of each assignment among its token's, in list order: 0 for the first choice, int32 _GA."""
    return slots(self.token, jnp.ones_like(self.valid), self.token.shape[-1])

  def only_list(self) -> "Routing":
    """Without losses, metrics and probabilities: what a dispatch gets."""
    return self.replace(losses={}, metrics={}, stats={}, log_prob=None, value=None, prob=None)

  def only_stats(self) -> "Routing":
    """Without the list and probabilities: what a train step keeps."""
    return self.replace(token=None, expert=None, gate=None, valid=None, kept=None, seed=None, prob=None)


def _replace(self: Routing, **changes: Any) -> Routing:
  """A copy with other values; a list with other tokens is in no known order unless that is given, too."""
  unknown: dict[str, Any] = {"order": None} if "token" in changes else {}
  return dataclasses.replace(self, **(unknown | changes))


Routing.replace = _replace  # type: ignore[assignment]  # flax replaces a method of the class


def sort_stable(key_GA: Array, num_keys: int) -> Array:
  """Indices along A that sort by key, in a stable order; keys are 0 to num_keys - 1."""
  A = key_GA.shape[-1]
  if num_keys * A > 2**32:
    return jnp.argsort(key_GA, axis=-1, stable=True)
  # One number holds key and index: XLA:CPU sorts those four times faster than it argsorts.
  index_GA = jax.lax.broadcasted_iota(jnp.uint32, key_GA.shape, 1)
  number_GA = key_GA.astype(jnp.uint32) * jnp.uint32(A) + index_GA
  return (jnp.sort(number_GA, axis=-1, stable=False) % jnp.uint32(A)).astype(jnp.int32)


def slots(expert_GA: Array, valid_GA: Array, num_experts: int) -> Array:
  """The slot that each assignment claims at its expert: the number of valid ones before it, int32 _GA.

  All dispatches call this function, and so do routers that must know what is dropped, so they agree. The
  slots of invalid assignments have no meaning.
  """
  key_GA = jnp.where(valid_GA, expert_GA, num_experts)
  order_GA = sort_stable(key_GA, num_experts + 1)  # list order is priority
  sorted_GA = jnp.take_along_axis(key_GA, order_GA, axis=-1)
  index_GA = jax.lax.broadcasted_iota(jnp.int32, key_GA.shape, 1)
  begins_GA = jnp.pad(sorted_GA[:, 1:] != sorted_GA[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  run_start_GA = jax.lax.cummax(jnp.where(begins_GA, index_GA, 0), axis=1)
  # vmap over groups: for a scatter that indexes groups, the partitioner would gather all of them.
  unsort = jax.vmap(lambda order_A, slot_A: slot_A.at[order_A].set(slot_A, unique_indices=True))
  return unsort(order_GA, index_GA - run_start_GA)


def count_experts(expert_GA: Array, valid_GA: Array, num_experts: int) -> Array:
  """Valid assignments per group and expert, int32 _GE."""
  key_GA = jnp.where(valid_GA, expert_GA, num_experts)
  return jax.vmap(lambda key_A: jnp.zeros(num_experts, jnp.int32).at[key_A].add(1, mode="drop"))(key_GA)
