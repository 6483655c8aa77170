"""Languages: one grammar over vocabularies that are permutations of each other; only context tells which."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from sparse_experts.data.testbeds.stream import Stream
from sparse_experts.errors import UserError
from sparse_experts.moe.keys import fold
from sparse_experts.moe.routing import Tokens


@struct.dataclass
class World:
  """N languages, V words of the grammar or of a text, D wide."""

  word_VD: Array
  past_VD: Array  # of words that stand before the token
  spelling_NV: Array  # of a language: word of the grammar -> word of a text

  def vectors(self, batch: "Batch") -> Array:
    """The token's vector and the mean over those before it in its sequence: causal, as attention."""
    *groups, N, S = batch.text_GNS.shape
    L = batch.target_GT.shape[-1] // N
    past_GNSD = self.past_VD[batch.text_GNS]
    before_GNLD = (jnp.cumsum(past_GNSD, axis=-2) - past_GNSD)[..., S - L:, :]
    words_GNLD = S - L + jax.lax.broadcasted_iota(jnp.float32, before_GNLD.shape, before_GNLD.ndim - 2)
    x_GNLD = self.word_VD[batch.text_GNS[..., S - L:]] + before_GNLD / words_GNLD
    return x_GNLD.reshape(*groups, N * L, -1)


@struct.dataclass
class Batch:
  tokens: Tokens  # id: the word; task: language
  text_GNS: Array  # the words of each sequence, those included that are context only
  target_GT: Array  # the next word


@dataclasses.dataclass(frozen=True)
class Languages(Stream):
  """A sequence is a random text in one language; all languages share a grammar. A token's target is the next
  word.

  The grammar has `classes` classes of equally many words. A word of class c is followed by one of class c + j
  (modulo `classes`) with the probabilities `jumps` for j = 1, 2, ..., what is left of them spread evenly over
  all classes; within a class each word is `fall` times as likely as the one before. A language spells each
  word of the grammar as a word of the text: a random permutation, so that no word belongs to a language. But
  words that are frequent in one are rare in others: what came before tells.

  `warmup` words of each sequence are context only. `past`: length of the context's vector by that of a word.
  `eps` is not used: the grammar has an entropy of its own.
  """

  targets: int = 64  # the vocabulary
  embed_dim: int = 64
  eps: float = 0.0
  classes: int = 8
  jumps: tuple[float, ...] = (0.7, 0.2)
  fall: float = 0.5
  warmup: int = 16
  past: float = 3.0

  def __post_init__(self):
    if self.targets % self.classes:
      raise UserError(f"targets={self.targets} words do not divide into classes={self.classes}; choose "
                      "a divisor")
    if not (sum(self.jumps) < 1 and len(self.jumps) < self.classes and self.warmup > 0):
      raise UserError(f"jumps={self.jumps} with classes={self.classes} and warmup={self.warmup}: jumps are "
                      "fewer than classes and below 1 together, and at least a word is context")

  @property
  def jump_C(self) -> np.ndarray:
    """Probability that the class moves on by 0, 1, 2, ..."""
    p_C = np.full(self.classes, (1 - sum(self.jumps)) / self.classes)
    p_C[1:1 + len(self.jumps)] += self.jumps
    return p_C

  @property
  def word_W(self) -> np.ndarray:
    """Probability of each word within its class."""
    p_W = self.fall ** np.arange(self.targets // self.classes)
    return p_W / p_W.sum()

  @property
  def floor(self) -> float:
    """Entropy of the next word given the language and the word: a class that moves on, a word in it."""
    return sum(-float((p * np.log(p)).sum()) for p in (self.jump_C, self.word_W))

  @functools.partial(jax.jit, static_argnums=0)
  def world(self, key: Array) -> World:
    normal = lambda name, *shape: jax.random.normal(fold(key, name), shape)
    spell = lambda key: jax.random.permutation(key, self.targets)
    return World(word_VD=normal("word", self.targets, self.embed_dim),
                 past_VD=self.past * normal("past", self.targets, self.embed_dim),
                 spelling_NV=jax.vmap(spell)(jax.random.split(fold(key, "spelling"), self.clusters)))

  @functools.partial(jax.jit, static_argnums=(0, 3))
  def batches(self, world: World, key: Array, shape: tuple[int, ...]) -> Batch:
    place_T, cluster_T = self.places(key, shape)
    shape_N, S = (*shape, self.clusters), self.warmup + self.length
    language_N = cluster_T.reshape(*shape_N, self.length)[..., 0]
    drawn = lambda name, p: jax.random.choice(fold(key, name), len(p), (*shape_N, S + 1), p=jnp.asarray(p))
    # The classes are a walk of independent jumps, from any class on.
    first_N1 = jax.random.randint(fold(key, "class"), (*shape_N, 1), 0, self.classes)
    class_NS = (first_N1 + jnp.cumsum(drawn("jump", self.jump_C), axis=-1)) % self.classes
    word_NS = class_NS * len(self.word_W) + drawn("rank", self.word_W)
    text_NS = world.spelling_NV[language_N[..., None], word_NS]
    last = lambda text_NS: text_NS[..., -self.length:].reshape(place_T.shape)
    return Batch(tokens=self.tokens(last(text_NS[..., :-1]), place_T, cluster_T), text_GNS=text_NS[..., :-1],
                 target_GT=last(text_NS[..., 1:]))

  def log_prob(self, world: World) -> Array:
    """log p(next word | word, language) as words of a text, _NVV; the rows are words."""
    W = len(self.word_W)
    class_V = np.arange(self.targets) // W
    p_VV = self.jump_C[(class_V[None] - class_V[:, None]) % self.classes] * np.tile(self.word_W, self.classes)
    place_NV = jnp.argsort(world.spelling_NV, axis=-1)  # word of a text -> word of the grammar
    return jnp.log(jnp.asarray(p_VV, jnp.float32))[place_NV[:, :, None], place_NV[:, None, :]]

  @functools.partial(jax.jit, static_argnums=0)
  def context_nats(self, world: World, batch: Batch) -> Array:
    """-log p(target) of the best model that is not told the language, _GT: it knows the language by Bayes'
    rule from the words so far. Its mean is the entropy given the context, `floor` that given the language."""
    *groups, N, S = batch.text_GNS.shape
    last_GN1 = batch.target_GT.reshape(*groups, N, self.length)[..., -1:]
    text_BS = jnp.concatenate([batch.text_GNS, last_GN1], axis=-1).reshape(-1, S + 1)
    step_NBS = self.log_prob(world)[:, text_BS[:, :-1], text_BS[:, 1:]]
    rank_NV = jnp.argsort(world.spelling_NV, axis=-1) % len(self.word_W)
    first_NB1 = jnp.log(jnp.asarray(self.word_W, jnp.float32))[rank_NV][:, text_BS[:, :1]]
    language_NBS = jax.nn.log_softmax(first_NB1 + jnp.cumsum(step_NBS, axis=2) - step_NBS, axis=0)
    nats_BS = -jax.nn.logsumexp(language_NBS + step_NBS, axis=0)
    return nats_BS[:, -self.length:].reshape(batch.target_GT.shape)
