"""A real model and a real run in seconds."""

import random

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from sparse_experts.config import default_config
from sparse_experts.moe import TopKRouter
from sparse_experts.training.loop import train

WORDS = "import return value self for in range None with open as file yield class def lambda".split()


def documents(seed: int = 0) -> list[bytes]:
  """Forty texts of made-up code."""
  rng = random.Random(seed)
  return [" ".join(rng.choices(WORDS, k=60)).encode() for _ in range(40)]


def tiny_config(**keys) -> ConfigDict:
  """Two layers, one of them with 8 experts, on 8 rows of 32 bytes; `train__steps=3` sets train.steps."""
  config = default_config().unlock()
  config.model.update(dict(num_layers=2, embed_dim=16, mlp_dim=32, num_heads=2, head_dim=8, group_size=32))
  config.data.update(dict(source="test", length=32))
  config.optimizer.update(dict(schedule="constant", warmup_steps=2, learning_rate=1e-2))
  config.train.update(dict(steps=4, batch_size=8, log_every=1, eval_every=2, checkpoint_every=2))
  config.eval.update(dict(batch_size=8, train_windows=20, min_bytes=900))
  for key, value in keys.items():
    *sections, name = key.split("__")
    section = config
    for s in sections:
      section = section[s]
    section[name] = value
  return config.lock()


def tiny_train(workdir, profile=0, **keys):
  return train(tiny_config(**keys), str(workdir), data=documents(), profile=profile)


class CountingRouter(TopKRouter):
  """Has state that gradients do not touch: the assignments of each expert so far."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.count = nnx.Variable(jnp.zeros(self.num_experts))

  def next_state(self, state, params, metrics, stats):
    return {"count": state["count"] + metrics["load"][0]}
