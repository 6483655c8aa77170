"""A model with the interface of `models.build` and next to no arithmetic: what training tests need."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sparse_experts.config import default_config


@struct.dataclass
class ToyRouting:
  losses: Any
  metrics: Any
  stats: Any = dataclasses.field(default_factory=dict)
  log_prob: Any = None


@dataclasses.dataclass(frozen=True)
class Layer:
  loss_weights: Any
  num_experts: int
  k: int = 1
  group_size: int = 8
  capacity: int | None = None
  layer_losses: str = "mean"


@dataclasses.dataclass(frozen=True)
class ToyModel:
  """Predicts the next token from the last; two 'sparse layers' of soft experts with both kinds of loss.

  Losses are made per group of `group` consecutive tokens and averaged over groups that hold real tokens,
  as those of `moe/` are, so that wrong counts or torn groups show.
  """

  vocab: int = 16
  dim: int = 8
  experts: int = 4
  group: int = 8
  noise: float = 0.0

  @property
  def axes(self):
    return {"embed": ("vocab", "embed"), "head": ("embed", "vocab"),
            "stack": {"router": ("layers", "embed", "router"), "w": ("layers", "expert", "embed", "embed")}}

  @property
  def sparse_layers(self):
    weights = {"load_balance": 0.5, "z": 0.25}
    return {f"decoder/{i:02d}": Layer(weights, self.experts, group_size=self.group) for i in (1, 3)}

  def init(self, key):
    shapes = {"embed": (self.vocab, self.dim), "head": (self.dim, self.vocab),
              "stack": {"router": (2, self.dim, self.experts), "w": (2, self.experts, self.dim, self.dim)}}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    params = [0.5 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, params), {"stack": {"calls": jnp.zeros((2, self.experts))}}

  def apply(self, params, buffers, batch, key=None, trace=False):
    x_BLD = params["embed"][batch["decoder_inputs"]]
    if key is not None and self.noise:
      x_BLD += self.noise * jax.random.normal(key, x_BLD.shape)
    mask_GT = (batch["segments"] > 0).reshape(-1, self.group)
    routings = {}
    for n, name in enumerate(self.sparse_layers):
      logit_BLE = x_BLD @ params["stack"]["router"][n]
      prob_BLE = jax.nn.softmax(logit_BLE)
      x_BLD += jnp.tanh(jnp.einsum("bld,edf,ble->blf", x_BLD, params["stack"]["w"][n], prob_BLE))
      logit_GTE, prob_GTE = (a.reshape(*mask_GT.shape, -1) for a in (logit_BLE, prob_BLE))
      routings[name] = self._routing(logit_GTE, prob_GTE, mask_GT)
    return x_BLD @ params["head"], routings

  def _routing(self, logit_GTE, prob_GTE, mask_GT):
    one_hot_GTE = jax.nn.one_hot(jnp.argmax(prob_GTE, -1), self.experts) * mask_GT[..., None]
    real_G = mask_GT.any(-1).astype(jnp.float32)
    tokens_G = jnp.maximum(mask_GT.sum(-1), 1)
    mean_GE = jnp.where(mask_GT[..., None], prob_GTE, 0).sum(1) / tokens_G[:, None]
    balance_G = self.experts * (one_hot_GTE.sum(1) / tokens_G[:, None] * mean_GE).sum(-1)
    z_G = jnp.where(mask_GT, jax.nn.logsumexp(logit_GTE, -1) ** 2, 0).sum(-1) / tokens_G
    count = mask_GT.sum().astype(jnp.float32)
    entropy = -jnp.where(mask_GT[..., None], prob_GTE * jnp.log(prob_GTE), 0).sum()
    zero = jnp.zeros(())
    return ToyRouting(
        losses={"load_balance": ((balance_G * real_G).sum(), real_G.sum()), "z": (z_G.sum(), real_G.sum())},
        metrics={"load": (one_hot_GTE.sum((0, 1)), count), "entropy": (entropy, count),
                 "dropped": (zero, count), "token_dropped": (zero, count)})

  def next_buffers(self, params, buffers, sums):
    loads = jnp.stack([sums[name]["metrics"]["load"][0] for name in self.sparse_layers])
    return {"stack": {"calls": buffers["stack"]["calls"] + loads}}


def toy_config(**train):
  c = default_config()
  c.train.update({"batch_size": 16, "steps": 4, **train})
  c.optimizer.update({"warmup_steps": 2, "learning_rate": 3e-2})
  return c


def toy_batch(seed=0, rows=16, length=8, vocab=16, padded=True):
  """Rows of uneven length, some empty: counts differ between micro-batches."""
  rng = np.random.default_rng(seed)
  targets = rng.integers(0, vocab, (rows, length), dtype=np.int32)
  inputs = (targets * 3 % vocab).astype(np.int32)  # tells the target: there is something to learn
  used = rng.integers(0, length + 1, rows) if padded else np.full(rows, length)
  if padded:
    used[: rows // 4] = 0
  real = np.arange(length) < used[:, None]
  return {
      "decoder_inputs": inputs, "targets": targets, "weights": real.astype(np.float32),
      "segments": real.astype(np.int32), "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
      "target_bytes": (real & (targets > 1)).astype(np.int32), "domain": np.zeros(rows, np.int32)}
