"""What generated streams share: groups of sequences, a stated best routing, and a known entropy."""

import abc
import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.keys import fold
from sparse_experts.moe.routing import Tokens

NOISES = 4096  # different noise vectors


class Batch(Protocol):
  """Numbers only, so that the batches of a run take little room; a step makes vectors of its own."""

  @property
  def tokens(self) -> Tokens:
    """id: what the token shows; task: the expert that it has under the best routing."""

  @property
  def target_GT(self) -> Array: ...


class World(Protocol):
  """What a seed draws once."""

  def vectors(self, batch: Any) -> Array:
    """The model's input, float32 _GTD."""


@dataclasses.dataclass(frozen=True)
class Stream(abc.ABC):
  """Tokens with a vector and one of `targets` as target, generated without end.

  A group holds one sequence of each cluster, a random one first: the best routing, which sends each cluster
  to its own expert (`tokens.task`), gives every expert the same share, and routers that balance by force can
  reach it too.

  clusters: sequences of a group. length: tokens of a sequence. eps: probability that a target is any of them.
  """

  clusters: int = 8
  length: int = 8
  targets: int = 32
  embed_dim: int = 32
  eps: float = 0.1

  @abc.abstractmethod
  def world(self, key: Array) -> Any:
    """What a seed draws once: a `World`."""

  @abc.abstractmethod
  def batches(self, world: Any, key: Array, shape: tuple[int, ...]) -> Any:
    """`shape` groups: a `Batch` whose arrays have the axes of a group, T, behind it."""

  @property
  def floor(self) -> float:
    """Entropy of a target given all that the best model may know, nats: no model is better in the mean."""
    return noise_entropy(self.eps, self.targets)

  def kinds(self, batch: Any) -> dict[str, Array]:
    """Which tokens are of a kind whose loss is of interest by itself, bool _GT by the kind's name."""
    return {}

  def places(self, key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(the sequence's place in its group, its cluster), _T behind `shape`."""
    shape_T = (*shape, self.clusters * self.length)
    place_T = jax.lax.broadcasted_iota(jnp.int32, shape_T, len(shape)) // self.length
    first = jax.random.randint(fold(key, "first"), (*shape, 1), 0, self.clusters)
    return place_T, (first + place_T) % self.clusters

  def tokens(self, id_T: Array, place_T: Array, cluster_T: Array) -> Tokens:
    """No two sequences of a batch have the same number."""
    shape = id_T.shape[:-1]
    group = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(*shape, 1)
    return Tokens(mask=jnp.ones(id_T.shape, bool), id=id_T, task=cluster_T,
                  sequence=group * self.clusters + place_T)

  def noisy(self, key: Array, target_T: Array) -> Array:
    """The targets, with probability `eps` any of them instead."""
    any_T = jax.random.randint(fold(key, "any"), target_T.shape, 0, self.targets)
    return jnp.where(jax.random.uniform(fold(key, "eps"), target_T.shape) < self.eps, any_T, target_T)


def noise_entropy(eps: float, targets: int) -> float:
  """Nats of a target that is known but with probability eps drawn from all `targets`."""
  rest = eps / targets
  likely = 1 - eps + rest
  return -likely * math.log(likely) - ((targets - 1) * rest * math.log(rest) if rest else 0.0)
