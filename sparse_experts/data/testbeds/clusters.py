"""Clusters: each has a map of its own from symbols to targets, and a token shows its cluster."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from sparse_experts.data.testbeds.stream import NOISES, Stream
from sparse_experts.moe.keys import fold
from sparse_experts.moe.routing import Tokens


@struct.dataclass
class World:
  """N clusters, V symbols, J coordinates, U targets, M noises, D wide."""

  symbol_VD: Array
  centre_ND: Array
  noise_MD: Array
  map_NV: Array  # of a cluster: symbol -> the target that is likely

  def vectors(self, batch: "Batch") -> Array:
    return (self.symbol_VD[batch.tokens.id] + self.centre_ND[batch.tokens.task]
            + self.noise_MD[batch.noise_GT])


@struct.dataclass
class Batch:
  tokens: Tokens  # id: symbol; task: cluster
  noise_GT: Array
  target_GT: Array


@dataclasses.dataclass(frozen=True)
class Clusters(Stream):
  """A token's vector is symbol + its cluster's centre + noise, its target map[cluster, symbol] or, with
  probability `eps`, any of the targets.

  A symbol is a point of `coordinates` dimensions, and a cluster's map is the largest of as many random linear
  functions of the point as there are targets. A narrow FFN holds one such map for all symbols, but not the
  maps of all clusters for a share of the symbols: so it is clusters that experts are to be made for.

  centre: deviation of a centre's coordinates; symbols' is 1. noise: deviation of the noise's coordinates.
  """

  symbols: int = 512
  coordinates: int = 8
  centre: float = 0.7
  noise: float = 0.1

  @functools.partial(jax.jit, static_argnums=0)
  def world(self, key: Array) -> World:
    normal = lambda name, *shape: jax.random.normal(fold(key, name), shape)
    point_VJ = normal("symbol", self.symbols, self.coordinates)
    map_NJU = normal("map", self.clusters, self.coordinates, self.targets)
    return World(
        symbol_VD=point_VJ @ normal("embed", self.coordinates, self.embed_dim) / self.coordinates**0.5,
        centre_ND=self.centre * normal("centre", self.clusters, self.embed_dim),
        noise_MD=self.noise * normal("noise", NOISES, self.embed_dim),
        map_NV=jnp.einsum("vj,nju->nvu", point_VJ, map_NJU).argmax(-1).astype(jnp.int32))

  @functools.partial(jax.jit, static_argnums=(0, 3))
  def batches(self, world: World, key: Array, shape: tuple[int, ...]) -> Batch:
    place_T, cluster_T = self.places(key, shape)
    draw = lambda name, n: jax.random.randint(fold(key, name), place_T.shape, 0, n)
    symbol_T = draw("symbol", self.symbols)
    return Batch(tokens=self.tokens(symbol_T, place_T, cluster_T), noise_GT=draw("noise", NOISES),
                 target_GT=self.noisy(key, world.map_NV[cluster_T, symbol_T]))
