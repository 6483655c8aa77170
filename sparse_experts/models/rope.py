"""Rotary positions (RoPE), and YaRN, which extends them to rows longer than a model was trained on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotates the pair (i, i + P/2) of each head by position * theta^(-2i/P) (Su et al. 2021).

  factor: above 1, YaRN (Peng et al. 2023) for rows `factor` times as long as `original_length`: pairs that
    turn less than `beta_slow` times over that length turn `factor` times slower, those that turn more than
    `beta_fast` times as before, the ones between in between; what is rotated is also multiplied by `gain`.
  mscale, mscale_all_dim: DeepSeek's gain in place of YaRN's own, if both are set, where latent attention
    also multiplies scores by `score_gain`.
  """

  theta: float = 10_000.0
  factor: float = 1.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 0.0

  def _scale(self, mscale: float) -> float:
    return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

  @property
  def gain(self) -> float:
    if self.mscale and self.mscale_all_dim:
      return self._scale(self.mscale) / self._scale(self.mscale_all_dim)
    return self._scale(1.0)

  @property
  def score_gain(self) -> float:
    return self._scale(self.mscale_all_dim) ** 2

  def frequencies(self, width: int) -> np.ndarray:
    """float32 angle per position of each of the width / 2 pairs."""
    half = np.arange(width // 2, dtype=np.float32)
    frequency = np.float32(self.theta) ** (-half / np.float32(width // 2))
    if self.factor <= 1:
      return frequency

    def pair_that_turns(times: float) -> float:
      return width * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(self.theta))

    low = max(math.floor(pair_that_turns(self.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(self.beta_slow)), width - 1)
    slow = np.clip((half - low) / max(high - low, 1e-3), 0, 1).astype(np.float32)
    return frequency / self.factor * slow + frequency * (1 - slow)

  def rotate(self, x_BLHP: jax.Array, position_BL: jax.Array) -> jax.Array:
    """In float32, in x's type."""
    frequency = self.frequencies(x_BLHP.shape[-1])
    angle = position_BL.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    a, b = jnp.split(x_BLHP.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if self.gain != 1.0:
      sin, cos = sin * self.gain, cos * self.gain
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHP.dtype)
