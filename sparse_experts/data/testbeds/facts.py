"""Facts against arithmetic: what is recalled needs parameters, what is computed needs width."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from sparse_experts.data.testbeds.stream import NOISES, Stream
from sparse_experts.errors import UserError
from sparse_experts.moe.keys import fold
from sparse_experts.moe.routing import Tokens


@struct.dataclass
class World:
  """V keys, M noises, D wide, of which 2J are operands' digits."""

  key_VD: Array
  digit_JD: Array  # orthogonal: where a digit of an operand stands
  centre_ND: Array  # of the two kinds
  noise_MD: Array
  value_V: Array  # of a key: the target that is likely

  def vectors(self, batch: "Batch") -> Array:
    digits_GTJ = signs(batch.operands_GT, self.digit_JD.shape[0])
    of_kind_GTD = jnp.where(batch.is_fact_GT[..., None], self.key_VD[batch.tokens.id],
                            digits_GTJ @ self.digit_JD)
    kind_GT = jnp.where(batch.is_fact_GT, 0, 1)
    return of_kind_GTD + self.centre_ND[kind_GT] + self.noise_MD[batch.noise_GT]


@struct.dataclass
class Batch:
  tokens: Tokens  # id: key; task: the key's share of the keys, or the sequence of arithmetic items
  is_fact_GT: Array
  operands_GT: Array  # uint32, both operands' digits
  noise_GT: Array
  target_GT: Array


@dataclasses.dataclass(frozen=True)
class Facts(Stream):
  """Sequences of facts and, `arithmetic` of the `clusters` in a group, of arithmetic items.

  A fact is one of `keys` random vectors, and its target a random value that only memory tells. Keys stand in
  shares, one for each sequence of facts; an expert for each share (or for any other share as large) has the
  fewest to remember.

  An arithmetic item shows two operands of `digits` digits, each 1 or -1; its target is the number of
  places in which they agree. Two hidden units compute one place. Operands are even over all there are, so
  every share of them is the same task: routing saves nothing but what little a region fixes of the digits.
  """

  targets: int = 17  # digits + 1
  keys: int = 1024
  arithmetic: int = 4
  digits: int = 16
  centre: float = 0.7
  noise: float = 0.1

  def __post_init__(self):
    if not 0 <= self.arithmetic <= self.clusters:
      raise UserError(f"arithmetic={self.arithmetic} is out of range; choose 0 to clusters={self.clusters}")
    if not 2 * self.digits <= min(self.embed_dim, 32) or self.targets <= self.digits:
      raise UserError(f"digits={self.digits} with embed_dim={self.embed_dim} and targets={self.targets}; two "
                      "operands need 2 digits dimensions (32 at most), their agreement digits + 1 targets")

  @property
  def shares(self) -> int:
    """Of the keys: sequences of facts in a group."""
    return self.clusters - self.arithmetic

  @functools.partial(jax.jit, static_argnums=0)
  def world(self, key: Array) -> World:
    normal = lambda name, *shape: jax.random.normal(fold(key, name), shape)
    rotation_DD = jnp.linalg.qr(normal("digit", self.embed_dim, self.embed_dim))[0]
    return World(
        key_VD=normal("key", self.keys, self.embed_dim), digit_JD=rotation_DD[:2 * self.digits],
        centre_ND=self.centre * normal("centre", 2, self.embed_dim),
        noise_MD=self.noise * normal("noise", NOISES, self.embed_dim),
        value_V=jax.random.randint(fold(key, "value"), (self.keys,), 0, self.targets))

  @functools.partial(jax.jit, static_argnums=(0, 3))
  def batches(self, world: World, key: Array, shape: tuple[int, ...]) -> Batch:
    place_T, cluster_T = self.places(key, shape)
    draw = lambda name, n: jax.random.randint(fold(key, name), place_T.shape, 0, n)
    is_fact_T = cluster_T < self.shares
    share = self.keys // max(self.shares, 1)
    key_T = jnp.where(is_fact_T, cluster_T * share, 0) + draw("key", share)
    operands_T = jax.random.bits(fold(key, "operands"), place_T.shape, jnp.uint32)
    answer_T = jnp.where(is_fact_T, world.value_V[key_T], agreeing(operands_T, self.digits))
    return Batch(tokens=self.tokens(key_T, place_T, cluster_T), is_fact_GT=is_fact_T, operands_GT=operands_T,
                 noise_GT=draw("noise", NOISES), target_GT=self.noisy(key, answer_T))

  def kinds(self, batch: Batch) -> dict[str, Array]:
    named = {"facts": (self.shares, batch.is_fact_GT), "arithmetic": (self.arithmetic, ~batch.is_fact_GT)}
    return {name: mask_GT for name, (sequences, mask_GT) in named.items() if sequences}


def signs(operands: Array, digits: int) -> Array:
  """The lowest `digits` bits as 1 and -1, float32, a new last axis."""
  place = jax.lax.broadcasted_iota(jnp.uint32, (*operands.shape, digits), operands.ndim)
  return 2.0 * (operands[..., None] >> place & 1).astype(jnp.float32) - 1.0


def agreeing(operands: Array, digits: int) -> Array:
  """In how many of `digits` places the first operand's digit, bit j, equals the second's, bit digits + j."""
  differ = (operands ^ (operands >> digits)) & jnp.uint32(2**digits - 1)
  return digits - jax.lax.population_count(differ).astype(jnp.int32)
