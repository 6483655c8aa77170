"""What adds up over the parts of a batch: pairs, and losses that are functions of the whole batch's sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

# (sum, count): added over groups, micro-batches and layers' calls, divided once, at the end.
Pair = tuple[Array, Array]


class Statistic(struct.PyTreeNode):
  """A loss of the whole batch that is no mean over its parts, such as the variation of experts' sums.

  `sums` and `count` add up as a pair's do, and then `function(sums, count)` is the loss, a scalar. The
  function is static: one of a module, or a frozen dataclass, so that two traces have the same. `sums` are
  float32, and `count` is of tokens, from masks alone.
  """

  sums: Any
  count: Array
  function: Callable[[Any, Array], Array] = struct.field(pytree_node=False)

  def pair(self) -> Pair:
    """(loss, 1) of all that was summed; (0, 0) without tokens."""
    is_real = self.count > 0
    return jnp.where(is_real, self.function(self.sums, self.count), 0.0), is_real.astype(jnp.float32)

  def part_of(self, whole: "Statistic") -> Array:
    """This part's share of the loss of `whole`, which has no gradient.

    Summed over the parts of `whole`, shares have the value and the gradient of its loss: a part's gradient is
    that of its own sums, at the sums of all.
    """
    sums = jax.tree.map(lambda all_, own: all_ + (own - jax.lax.stop_gradient(own)), whole.sums, self.sums)
    loss = jnp.where(whole.count > 0, self.function(sums, whole.count), 0.0)
    fixed = jax.lax.stop_gradient(loss)
    return fixed * self.count / jnp.maximum(whole.count, 1.0) + (loss - fixed)


Loss = Pair | Statistic


def as_pair(loss: Loss) -> Pair:
  """(sum, count) of a loss in `Routing.losses`, of all that was summed."""
  return loss.pair() if isinstance(loss, Statistic) else loss
