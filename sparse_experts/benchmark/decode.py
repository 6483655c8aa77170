"""Cached decoding against batch size: a sparse decoder, its dense twin, a dense one of as many parameters.

Weights are drawn, not trained, and the likeliest token is taken: time does not depend on which. Tokens
follow a prompt; only they are timed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparse_experts.benchmark.timing import Program, interleave
from sparse_experts.config import dense_twin
from sparse_experts.config.dotted import replaced
from sparse_experts.errors import UserError
from sparse_experts.models import INIT_COMPILER_OPTIONS, build, counts
from sparse_experts.models.match import match
from sparse_experts.partitioning import is_axes

BATCHES = (1, 4, 16, 64, 256)
PROMPT, LENGTH = 32, 32


def configs(config: ConfigDict, vocab_size: int) -> dict[str, ConfigDict]:
  """The three that are compared."""
  if config.model.name != "decoder":
    raise UserError(f"benchmark decode needs a decoder, and model.name='{config.model.name}'; choose another "
                    "--config")
  count = lambda c: counts.describe(c, vocab_size)["params_total"]
  twin = dense_twin(config)
  return {"sparse": config, "dense_twin": twin,
          "matched_dense": replaced(twin, match(twin, count(config), count).overrides)}


def measure(config: ConfigDict, vocab_size: int, runs: int, batches: Sequence[int] = BATCHES,
            prompt: int = PROMPT, length: int = LENGTH,
            say: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
  """What docs/measures.md defines under `benchmark decode`, a row per batch size; `say` gets each row."""
  models, rows = {}, []
  for name, c in configs(config, vocab_size).items():
    model = build(c, vocab_size, "dropless")
    options = INIT_COMPILER_OPTIONS if jax.default_backend() == "cpu" else None
    models[name] = model, *jax.jit(model.init, compiler_options=options)(jax.random.key(0))
  for B in batches:
    times = interleave(
        {name: decode_program(*model, B, prompt, length) for name, model in models.items()}, runs)
    rows.append({"batch": B, "models": {name: {
        "ms_per_token": times[name].median / length,
        "ms_per_token_quartiles": [q / length for q in times[name].quartiles],
        "tokens_per_second": 1e3 * B * length / times[name].median,
        "weight_mib": weight_bytes(*models[name][:2], B) / 2**20} for name in models}})
    say(rows[-1])
  total = lambda params: sum(math.prod(a.shape) for a in jax.tree.leaves(params))
  return {"prompt": prompt, "length": length, "runs": runs, "rows": rows,
          "params_total": {name: total(params) for name, (_, params, _) in models.items()}}


def decode_program(model: Any, params: Any, buffers: Any, B: int, prompt: int, length: int) -> Program:
  """`length` tokens after a prompt, one after another, for B rows at once."""

  def step(params, buffers, cache, id_BL):
    logits_BLV, cache = model.decode(params, buffers, cache, id_BL)
    return cache, jnp.argmax(logits_BLV[:, -1:], axis=-1).astype(jnp.int32)

  def fill(params, buffers, start_BL):
    return step(params, buffers, model.init_cache(B, prompt + length), start_BL)

  def draw(params, buffers, cache, last_B1):
    return jax.lax.fori_loop(0, length, lambda _, carry: step(params, buffers, *carry), (cache, last_B1))[1]

  start_BL = jax.random.randint(jax.random.key(1), (B, prompt), 3, 200, jnp.int32)
  return Program(draw, (params, buffers, *jax.jit(fill)(params, buffers, start_BL)))


def weight_bytes(model: Any, params: Any, B: int) -> float:
  """Of a step: all weights, but of experts the share that some token is expected to choose, if they are even.

  E (1 − (1 − K / E)^B) experts of a layer, for B tokens that choose K of E each by themselves.
  """
  k_of = {(layer.num_experts, layer.k) for layer in model.sparse_layers.values()}
  E, K = next(iter(k_of), (1, 1))
  share = 1 - (1 - K / E) ** B
  axes = jax.tree.leaves(model.axes, is_leaf=is_axes)
  return sum(a.nbytes * (share if "expert" in names else 1.0)
             for a, names in zip(jax.tree.leaves(params), axes, strict=True))
