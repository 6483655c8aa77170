"""Image composites: tiles of handwritten digits in styles whose labels contradict each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from sparse_experts.data.images.sources import digits
from sparse_experts.data.testbeds.stream import NOISES, Stream
from sparse_experts.errors import UserError
from sparse_experts.moe.keys import fold
from sparse_experts.moe.routing import Tokens

EDGE, LABELS = 8, 10
SHIFTS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]


@struct.dataclass
class World:
  """N styles, I shifted digits, M noises, D = 64 pixels."""

  image_ID: Array
  turn_ND: Array  # of a style: from which pixel of the digit a pixel of the tile comes
  paper_ND: Array  # of a style: what its digits are drawn on
  noise_MD: Array
  name_NL: Array  # of a style: label of a digit -> the target that is likely

  def vectors(self, batch: "Batch") -> Array:
    turned_GTD = jnp.take_along_axis(self.image_ID[batch.tokens.id], self.turn_ND[batch.tokens.task], axis=-1)
    return turned_GTD + self.paper_ND[batch.tokens.task] + self.noise_MD[batch.noise_GT]


@struct.dataclass
class Batch:
  tokens: Tokens  # id: the shifted digit; task: style
  noise_GT: Array
  target_GT: Array


@dataclasses.dataclass(frozen=True)
class Composites(Stream):
  """Images of `length` tiles, each a token: one of scikit-learn's 1,797 digits, moved by up to a pixel.

  All tiles of an image have its style, one of the square's eight symmetries (turned, mirrored), a paper and
  names of its own for the ten digits: the same tile has another target in another style. The target is that
  name or, with probability `eps`, any. Tiles are never drawn twice alike: 16,173 digits and shifts, 8 styles,
  4,096 noises. What a tile shows is known exactly, and so is the entropy of its target.

  paper: deviation of a paper's pixels; that of digits' pixels is 1 over all. noise: deviation of the noise's.
  """

  targets: int = LABELS
  embed_dim: int = EDGE * EDGE
  paper: float = 0.5
  noise: float = 0.3

  def __post_init__(self):
    if self.clusters > len(symmetries()) or self.embed_dim != EDGE * EDGE or self.targets != LABELS:
      raise UserError(f"clusters={self.clusters}, embed_dim={self.embed_dim}, targets={self.targets}: digits "
                      f"have {EDGE * EDGE} pixels, {LABELS} labels and at most {len(symmetries())} styles")

  @functools.partial(jax.jit, static_argnums=0)
  def world(self, key: Array) -> World:
    normal = lambda name, n: jax.random.normal(fold(key, name), (n, self.embed_dim))
    permuted = lambda name, x, n: jax.vmap(lambda key: jax.random.permutation(key, x))(
        jax.random.split(fold(key, name), n))
    turn_ND = jax.random.permutation(fold(key, "turn"), jnp.asarray(symmetries()))[:self.clusters]
    return World(image_ID=jnp.asarray(shifted()[0]), turn_ND=turn_ND,
                 paper_ND=self.paper * normal("paper", self.clusters),
                 noise_MD=self.noise * normal("noise", NOISES),
                 name_NL=permuted("name", jnp.arange(LABELS), self.clusters))

  @functools.partial(jax.jit, static_argnums=(0, 3))
  def batches(self, world: World, key: Array, shape: tuple[int, ...]) -> Batch:
    place_T, style_T = self.places(key, shape)
    draw = lambda name, n: jax.random.randint(fold(key, name), place_T.shape, 0, n)
    digit_T = draw("digit", len(world.image_ID))
    label_T = jnp.asarray(shifted()[1])[digit_T]
    return Batch(tokens=self.tokens(digit_T, place_T, style_T), noise_GT=draw("noise", NOISES),
                 target_GT=self.noisy(key, world.name_NL[style_T, label_T]))


@functools.cache
def shifted() -> tuple[np.ndarray, np.ndarray]:
  """(pixels _ID with mean 0 and deviation 1 over all, labels _I) of every digit at each of nine places."""
  images, _ = digits()
  grey_NHW = np.stack([image["image"][..., 0] for image in images]).astype(np.float32)
  padded_NHW = np.pad(grey_NHW, [(0, 0), (1, 1), (1, 1)])
  at = lambda down, right: padded_NHW[:, 1 - down:1 - down + EDGE, 1 - right:1 - right + EDGE]
  grey_ID = np.concatenate([at(*shift) for shift in SHIFTS]).reshape(-1, EDGE * EDGE)
  label_I = np.tile(np.array([image["label"] for image in images], np.int32), len(SHIFTS))
  return (grey_ID - grey_ID.mean()) / grey_ID.std(), label_I


@functools.cache
def symmetries() -> np.ndarray:
  """The square's eight: from which pixel each pixel comes, int32 [8, D]."""
  pixel_HW = np.arange(EDGE * EDGE, dtype=np.int32).reshape(EDGE, EDGE)
  turned = [np.rot90(side, quarter) for side in (pixel_HW, pixel_HW.T) for quarter in range(4)]
  return np.stack([side.reshape(-1) for side in turned])
