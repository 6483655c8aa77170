"""The largest learning rate that trains: experts in attention, routers in bfloat16 (Switch, 2.4, appendix A).

One block on a stream of sequences: causal self-attention and an FFN, with residuals and norms. An arm has
`place` (attention or ffn: which of the two is sparse, 8 experts, top-1, equal FLOPs a token), `dtype` of the
activations (weights stay float32) and `precision` of the router: `float32`, which is Switch's selective
precision where activations are bfloat16, or `bfloat16` for its weights, product and probabilities. Besides
`stream`, `steps` and for `loss` a `rate`, as in `experiments/testbed/measure.py`.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.routers_side_by_side.train import Program, Setting
from experiments.testbed.measure import finite, shortened, text
from sparse_experts.data.testbeds import STREAMS
from sparse_experts.data.testbeds.stream import Batch, World
from sparse_experts.models.attention import attend
from sparse_experts.models.blocks import RMSNorm
from sparse_experts.models.template import Routings, Tree, fold
from sparse_experts.moe import Experts, MoELayer, Tokens, TopKRouter
from sparse_experts.moe.linear_experts import LinearExperts
from sparse_experts.tasks import sums as task_sums

HEADS = 4
EXPONENTS = range(-6, 5)  # of 2: the rates that are tried, from 1/64 to 16


class RoundedRouter(TopKRouter):
  """A top-k router all of whose numbers are bfloat16."""

  def score(self, x_GTD: Array) -> Array:
    rounded = x_GTD.astype(jnp.bfloat16), self.w[...].astype(jnp.bfloat16)
    return jnp.einsum("gtd,de->gte", *rounded).astype(jnp.float32)

  def gates(self, logit_GTE: Array, expert_GTK: Array, prob_GTK: Array) -> Array:
    return prob_GTK.astype(jnp.bfloat16).astype(jnp.float32)


ROUTERS = {"float32": TopKRouter, "bfloat16": RoundedRouter}


class Block(nnx.Module):
  """logits = (x + attention(x) + ffn(x)) head, one of the two behind the other; `layer` is the sparse one."""

  def __init__(self, setting: Setting, place: str, dtype: str, precision: str, key: Array):
    d, self.length = setting.stream.embed_dim, setting.stream.length
    self.dtype, self.attention_first = jnp.dtype(dtype), place == "attention"
    rngs = lambda name: nnx.Rngs(params=fold(key, name))
    projection = lambda n: LinearExperts(n, d, 3 * d, variance=1 / d, rngs=rngs("projection"))
    ffn = lambda n: Experts(n, d, setting.expert_dim, init_scale=1.0, rngs=rngs("ffn"))
    sparse, other = (projection, ffn) if self.attention_first else (ffn, projection)
    router = ROUTERS[precision](d, setting.experts, rngs=rngs("router"))
    self.layer, self.dense = MoELayer(router, sparse(setting.experts)), other(1)
    self.norms = nnx.List([RMSNorm(d) for _ in range(3)])
    draw = lambda name, n: nnx.Param(jax.random.normal(fold(key, name), (d, n)) / d**0.5)
    self.out, self.head = draw("out", d), draw("head", setting.stream.targets)

  @property
  def sparse_layers(self) -> dict[str, MoELayer]:
    return {"layer": self.layer}

  def __call__(self, x_GTD: Array, tokens: Tokens, key: Array | None = None) -> tuple[Array, Routings]:
    x_GTD, routings = x_GTD.astype(self.dtype), {}

    def apply(is_sparse: bool, y_GTD: Array) -> Array:
      if not is_sparse:
        rows_1RD = y_GTD.reshape(1, -1, y_GTD.shape[-1])
        return self.dense.batched(rows_1RD).reshape(*y_GTD.shape[:2], -1)
      y_GTD, routings["layer"] = self.layer(y_GTD, tokens, key)
      return y_GTD

    x_GTD += self._attended(apply(self.attention_first, self.norms[0](x_GTD)))
    x_GTD += apply(not self.attention_first, self.norms[1](x_GTD))
    logits_GTV = self.norms[2](x_GTD) @ self.head[...].astype(self.dtype)
    return logits_GTV.astype(jnp.float32), routings

  def _attended(self, y_GTF: Array) -> Array:
    """Of queries, keys and values side by side; each sequence of a group by itself, causally."""
    split = y_GTF.reshape(-1, self.length, 3, HEADS, y_GTF.shape[-1] // (3 * HEADS))
    past_1LL = jnp.tril(jnp.ones((1, self.length, self.length), bool))
    q_BLHP, k_BLHP, v_BLHP = (split[:, :, i] for i in range(3))
    y_BLHP = attend(q_BLHP, k_BLHP, v_BLHP, past_1LL, None, 0.0, None, q_BLHP.shape[-1]**-0.5)
    return y_BLHP.reshape(*y_GTF.shape[:2], -1) @ self.out[...].astype(y_GTF.dtype)


class BlockProgram(Program):
  """`Program` of a `Block`."""

  def __init__(self, setting: Setting, place: str, dtype: str, precision: str):
    super().__init__(setting, "top_k", {}, net=functools.partial(Block, setting, place, dtype, precision))

  def _measures(self, params: Tree, buffers: Tree, world: World, batch: Batch) -> dict[str, Array]:
    logits_GTV, _ = self.template.bind(params, buffers)(world.vectors(batch), batch.tokens)
    return {"loss": task_sums.cross_entropy(logits_GTV, batch.target_GT).mean()}


def log2_stable_rate(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Base-2 logarithm of the largest learning rate up to which the block trains.

  It trains if, on groups that no run trains on, it learns more than half of what there is: the loss is below
  the mean of that of guessing and the stream's entropy. EXPONENTS are tried upwards until one does not, and
  between the last two the loss is interpolated; where it is not finite, the last one that trains counts. None
  if the smallest does not train.
  """
  program = _program(text(arm), quick)
  stream = program.setting.stream
  wanted, last = (math.log(stream.targets) + stream.floor) / 2, None
  for exponent in EXPONENTS[::4] if quick else EXPONENTS:
    value = program.run(2.0**exponent, seed)["loss"]
    if not value < wanted:
      if last is None:
        return None
      share = (wanted - last[1]) / (value - last[1]) if math.isfinite(value) else 0.0
      return last[0] + share * (exponent - last[0])
    last = exponent, value
  return float(EXPONENTS[-1])


def loss(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Nats per target on groups that no run trains on, at the arm's `rate`."""
  program = _program(text({key: value for key, value in arm.items() if key != "rate"}), quick)
  return finite(program.run(arm["rate"], seed)["loss"])


@functools.lru_cache(maxsize=8)
def _program(arm: str, quick: bool) -> BlockProgram:
  given = json.loads(arm)
  setting = dataclasses.replace(Setting(), stream=STREAMS[given["stream"]], steps=given["steps"])
  if quick:
    setting = shortened(setting)
  return BlockProgram(setting, given["place"], given["dtype"], given["precision"])
