"""Figures of Switch's claims that one loss does not give: steps to a loss, rounding, and starts that vary.

Arms are those of `experiments/testbed/measure.py` with fields of their own, see each function.
"""

import functools
import json
import math
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.testbed import measure
from experiments.testbed.measure import finite, text
from sparse_experts.models.template import Tree
from sparse_experts.moe.routing import scores

# Of an arm's steps; each share is trained by itself, as a schedule ends in its last step.
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
LARGEST = 128.0  # of the logits' absolute values, in `rounding_error`


def log2_steps(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Base-2 logarithm of the steps that take the arm to the loss of `reference` after all of its steps.

  Interpolated between the logarithms of SHARES of the arm's steps. Below the smallest it is the smallest; an
  arm that never gets there has no figure.
  """
  own = {key: value for key, value in arm.items() if key != "reference"}
  wanted = _losses(text(arm["reference"]), seed, quick)[-1][1]
  curve = _losses(text(own), seed, quick)
  at, losses = (np.array(column) for column in zip(*curve, strict=True))
  lowest = np.minimum.accumulate(losses)
  if lowest[-1] > wanted:
    return None
  return float(np.interp(-wanted, -lowest, at))


@functools.lru_cache(maxsize=64)
def _losses(arm: str, seed: int, quick: bool) -> list[tuple[float, float]]:
  """(log2 of the steps, loss) for each of SHARES."""
  program, rate = measure.program(arm, quick), json.loads(arm)["rate"]
  steps = [max(1, round(program.setting.steps * share)) for share in SHARES]
  return [(math.log2(n), program.run(rate, seed, n)["loss"]) for n in steps]


def flips(arm: Mapping[str, Any], seed: int, quick: bool) -> float:
  """Share of tokens whose first expert is another one than the float32 router's; `precision`: see `_logits`.

  Of the arm's trained router, on tokens that it was not trained on, which are rounded to bfloat16 first. A
  scale of the logits changes no flip: bfloat16's rounding is relative.
  """
  exact, rounded = _both(arm, seed, quick)
  return float((exact.argmax(-1) != rounded.argmax(-1)).mean())


def rounding_error(arm: Mapping[str, Any], seed: int, quick: bool) -> float:
  """Mean absolute error of the first choice's probability, with logits scaled to at most LARGEST."""
  exact, rounded = _both(arm, seed, quick)
  scale = LARGEST / jnp.abs(exact).max()
  first = exact.argmax(-1)[..., None]
  of = lambda logit: jnp.take_along_axis(scores.softmax(logit * scale), first, -1)
  return float(jnp.abs(of(rounded) - of(exact)).mean())


def _both(arm: Mapping[str, Any], seed: int, quick: bool) -> tuple[Array, Array]:
  """Logits of the float32 router and of the arm's `precision`, float32 _GTE."""
  x_GTD, w_DE = _inputs(text({key: value for key, value in arm.items() if key != "precision"}), seed, quick)
  return _logits(x_GTD, w_DE, "float32"), _logits(x_GTD, w_DE, arm["precision"])


@functools.lru_cache(maxsize=16)
def _inputs(arm: str, seed: int, quick: bool) -> tuple[Array, Array]:
  """Tokens in bfloat16 and the trained router's weights."""
  program = measure.program(arm, quick)
  params, _ = program.trained(json.loads(arm)["rate"], seed)
  world, batch = program.frozen(seed)
  return world.vectors(batch).astype(jnp.bfloat16), params["layer"]["router"]["w"]


def _logits(x_GTD: Array, w_DE: Array, precision: str) -> Array:
  """`float32`; `selective`, as Switch, where only tokens are bfloat16; or `bfloat16` weights and product."""
  if precision == "bfloat16":
    return jnp.einsum("gtd,de->gte", x_GTD, w_DE.astype(jnp.bfloat16)).astype(jnp.float32)
  if precision == "selective":
    return scores.linear(x_GTD, w_DE)
  return jnp.einsum("gtd,de->gte", x_GTD.astype(jnp.float32), w_DE, precision=jax.lax.Precision.HIGHEST)


def early_loss(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Loss after `early` steps where all weights of the layer start with variance `init_scale` / fan-in."""
  return finite(_early(text(arm), seed, quick))


def early_spread(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Distance of `early_loss` from its median over the first `of_seeds` seeds of this one's hundred.

  Equal spreads are tested by these distances (Brown and Forsythe 1974).
  """
  first = seed - seed % 100
  losses = [_early(text(arm), s, quick) for s in range(first, first + (2 if quick else arm["of_seeds"]))]
  return finite(abs(_early(text(arm), seed, quick) - statistics.median(losses)))


@functools.lru_cache(maxsize=256)
def _early(arm: str, seed: int, quick: bool) -> float:
  given = json.loads(arm)
  own = {key: value for key, value in given.items() if key not in ("init_scale", "early", "of_seeds")}
  program = measure.program(text(own), quick)
  change = functools.partial(_rescaled, given["init_scale"], program.setting.stream.embed_dim)
  return program.run(given["rate"], seed, min(given["early"], program.setting.steps), change)["loss"]


def _rescaled(scale: float, width: int, params: Tree) -> Tree:
  """The same draws with another deviation: of the experts, which start with 0.1, and of the router."""
  layer = params["layer"]
  experts = jax.tree.map(lambda w: w * math.sqrt(scale / 0.1), layer["experts"])
  router = {**layer["router"], "w": layer["router"]["w"] / 0.02 * math.sqrt(scale / width)}
  return {**params, "layer": {**layer, "experts": experts, "router": router}}
