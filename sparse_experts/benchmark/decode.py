"""Times cached decoding by batch size: a sparse decoder, its dense twin, and a dense one of equal parameters.

Weights are random and decoding is greedy: time does not depend on the tokens. The prompt is not timed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_experts.benchmark.timing import Program, Sample, interleave
from sparse_experts.config import ConfigDict, dense_twin, replaced
from sparse_experts.errors import UserError
from sparse_experts.models import INIT_COMPILER_OPTIONS, Buffers, Model, Params, build, counts
from sparse_experts.models.decoder import Decoder
from sparse_experts.models.match import match
from sparse_experts.partitioning import is_axes

BATCHES = (1, 4, 16, 64, 256)
PROMPT, LENGTH = 32, 32


def configs(config: ConfigDict, vocab_size: int) -> dict[str, ConfigDict]:
  """The configs of the three models that are compared."""
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
  """The figures that docs/measures.md defines under `benchmark decode`; `say` gets each batch size's row."""
  models: dict[str, tuple[Decoder, Params, Buffers]] = {}
  rows: list[dict[str, Any]] = []
  for name, c in configs(config, vocab_size).items():
    model = build(c, vocab_size, "dropless")
    options = INIT_COMPILER_OPTIONS if jax.default_backend() == "cpu" else None
    assert isinstance(model, Decoder)  # or `configs` refused it
    params, buffers = jax.jit(model.init, compiler_options=options)(jax.random.key(0))
    models[name] = model, params, buffers
  for B in batches:
    times = interleave(
        {name: decode_program(*model, B, prompt, length) for name, model in models.items()}, runs)
    rows.append({"batch": B, "models": {name: {
        **Sample(times[name].values / length).named("ms_per_token"),
        "tokens_per_second": 1e3 * B * length / times[name].median,
        "weight_mib": weight_bytes(models[name][0], models[name][1], B) / 2**20} for name in models}})
    say(rows[-1])
  total = lambda params: sum(a.size for a in jax.tree.leaves(params))
  return {"prompt": prompt, "length": length, "runs": runs, "rows": rows,
          "params_total": {name: total(params) for name, (_, params, _) in models.items()}}


def decode_program(model: Decoder, params: Params, buffers: Buffers, B: int, prompt: int,
                   length: int) -> Program:
  """Decodes `length` tokens after a prompt, for B rows at once."""

  def step(params, buffers, cache, id_BL):
    logits_BLV, cache = model.decode(params, buffers, cache, id_BL)
    return cache, jnp.argmax(logits_BLV[:, -1:], axis=-1).astype(jnp.int32)

  def fill(params, buffers, start_BL):
    return step(params, buffers, model.init_cache(B, prompt + length), start_BL)

  def draw(params, buffers, cache, last_B1):
    return jax.lax.fori_loop(0, length, lambda _, carry: step(params, buffers, *carry), (cache, last_B1))[1]

  start_BL = jax.random.randint(jax.random.key(1), (B, prompt), 3, 200, jnp.int32)
  return Program(draw, (params, buffers, *jax.jit(fill)(params, buffers, start_BL)))


def weight_bytes(model: Model, params: Params, B: int) -> float:
  """Weights that a step reads: all, but of experts the expected share that is chosen by some token.

  E (1 − (1 − K / E)^B) experts of a layer, for B tokens that choose K of E independently and uniformly.
  """
  k_of = {(layer.num_experts, layer.k) for layer in model.sparse_layers.values()}
  E, K = next(iter(k_of), (1, 1))
  share = 1 - (1 - K / E) ** B
  axes = jax.tree.leaves(model.axes, is_leaf=is_axes)
  return sum(a.nbytes * (share if "expert" in names else 1.0)
             for a, names in zip(jax.tree.leaves(params), axes, strict=True))
