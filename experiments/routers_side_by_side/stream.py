"""A stream whose best routing is known: sequences come from clusters, each with a map of its own."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from sparse_experts.models.template import fold
from sparse_experts.moe import Tokens

_NOISES = 4096  # different noise vectors


@struct.dataclass
class World:
  """What a seed draws once. N clusters, V symbols, J coordinates, U targets, M noises, D wide."""

  symbol_VD: Array
  centre_ND: Array
  noise_MD: Array
  map_NV: Array  # of a cluster: symbol -> the target that is likely

  def vectors(self, batch: "Batch") -> Array:
    return (self.symbol_VD[batch.tokens.id] + self.centre_ND[batch.tokens.task]
            + self.noise_MD[batch.noise_GT])


@struct.dataclass
class Batch:
  """Numbers only, so that the batches of a run take little room; a step makes vectors of its own."""

  tokens: Tokens  # id: symbol; task: cluster
  noise_GT: Array
  target_GT: Array


@dataclasses.dataclass(frozen=True)
class Stream:
  """A token's vector is symbol + its cluster's centre + noise, its target map[cluster, symbol] or, with
  probability `eps`, any of the targets.

  A symbol is a point of `coordinates` dimensions, and a cluster's map is the largest of as many random linear
  functions of the point as there are targets. A narrow FFN holds one such map for all symbols, but not the
  maps of all clusters for a share of the symbols: so it is clusters that experts are to be made for.

  A group holds one sequence of each cluster, a random one first: the best routing gives every expert the
  same share, and routers that balance by force can reach it too.
  """

  clusters: int = 8
  symbols: int = 512
  coordinates: int = 8
  targets: int = 32
  embed_dim: int = 32
  length: int = 8  # of a sequence
  centre: float = 0.7  # deviation of a centre's coordinates; symbols' is 1
  noise: float = 0.1  # deviation of the noise's coordinates
  eps: float = 0.1

  @functools.partial(jax.jit, static_argnums=0)
  def world(self, key: Array) -> World:
    normal = lambda name, *shape: jax.random.normal(fold(key, name), shape)
    point_VJ = normal("symbol", self.symbols, self.coordinates)
    map_NJU = normal("map", self.clusters, self.coordinates, self.targets)
    return World(
        symbol_VD=point_VJ @ normal("embed", self.coordinates, self.embed_dim) / self.coordinates**0.5,
        centre_ND=self.centre * normal("centre", self.clusters, self.embed_dim),
        noise_MD=self.noise * normal("noise", _NOISES, self.embed_dim),
        map_NV=jnp.einsum("vj,nju->nvu", point_VJ, map_NJU).argmax(-1).astype(jnp.int32))

  @functools.partial(jax.jit, static_argnums=(0, 3))
  def batches(self, world: World, key: Array, shape: tuple[int, ...]) -> Batch:
    """`shape` groups; arrays have the axes of a group, T, behind it."""
    shape_T = (*shape, self.clusters * self.length)
    draw = lambda name, shape, n: jax.random.randint(fold(key, name), shape, 0, n)
    place_T = jax.lax.broadcasted_iota(jnp.int32, shape_T, len(shape)) // self.length  # of the sequence
    cluster_T = (draw("first", (*shape, 1), self.clusters) + place_T) % self.clusters
    symbol_T = draw("symbol", shape_T, self.symbols)
    is_any_T = jax.random.uniform(fold(key, "eps"), shape_T) < self.eps
    group = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(*shape, 1)
    return Batch(
        tokens=Tokens(mask=jnp.ones(shape_T, bool), id=symbol_T, task=cluster_T,
                      sequence=group * self.clusters + place_T),
        noise_GT=draw("noise", shape_T, _NOISES),
        target_GT=jnp.where(is_any_T, draw("any", shape_T, self.targets), world.map_NV[cluster_T, symbol_T]))

  @property
  def floor(self) -> float:
    """Entropy of a target given cluster and symbol, nats: no model is better in the mean."""
    rest = self.eps / self.targets
    likely = 1 - self.eps + rest
    return -likely * math.log(likely) - (self.targets - 1) * rest * math.log(rest)
