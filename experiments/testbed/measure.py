"""Figures of one arm and seed on a stream whose best routing is known, for claims that need no language.

An arm of a claim file: `router` (a name, or "dense"), `rate`, `stream` (a name of STREAMS in
`sparse_experts/data/testbeds`; clusters if it says none), and where they differ from the setting of
`experiments/routers_side_by_side`: `arguments` of the router, `layer` and `eval_layer` (of MoELayer, while
training and measuring), `steps`, `experts`, `expert_dim`, `extra_ffn`.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments.routers_side_by_side.train import Net, Program, Setting
from sparse_experts.analysis.calibration import BINS
from sparse_experts.data.testbeds import STREAMS
from sparse_experts.data.testbeds.stream import Batch, World
from sparse_experts.errors import UserError, nearest
from sparse_experts.models.template import Tree
from sparse_experts.moe.routing import as_pair
from sparse_experts.tasks import sums as task_sums

FIELDS = {"router", "rate", "stream", "arguments", "layer", "eval_layer", "steps", "experts", "expert_dim",
          "extra_ffn"}
_OF_SETTING = ("steps", "experts", "expert_dim", "extra_ffn")
QUICK_STEPS = 20
ORACLE: dict[str, Any] = {"router": "task"}
RANDOM: dict[str, Any] = {"router": "random", "arguments": {"draw": "token"}}
# The oracle's better rate of 0.01 and 0.03, on seeds that no claim counts.
RATES = dict.fromkeys(STREAMS, 0.01) | {"clusters": 0.03}


class Bench(Program):
  """A program that may be measured with another layer than it trains with, and tells the router's logits."""

  def __init__(self, setting: Setting, name: str, arguments: Mapping[str, Any], layer: Mapping[str, Any],
               eval_layer: Mapping[str, Any]):
    measured = functools.partial(Net, setting, name, dict(arguments), layer=eval_layer)
    super().__init__(setting, name, dict(arguments), layer, measured=measured)

  def _measures(self, params: Tree, buffers: Tree, world: World, batch: Batch) -> dict[str, Array]:
    found = super()._measures(params, buffers, world, batch)
    logits_GTV, routings = self.measured.bind(params, buffers)(world.vectors(batch), batch.tokens)
    found |= {"calibration_error": _calibration_error(logits_GTV, batch.target_GT)}
    if "layer" in routings and "z" in routings["layer"].losses:
      total, count = as_pair(routings["layer"].losses["z"])
      found |= {"logits": total / count}
    return found


def _calibration_error(logits_GTV: Array, target_GT: Array) -> Array:
  """Σ share |accuracy - mean confidence| over bins of equal width of the confidence (Guo et al. 2017)."""
  confidence_GT, right_GT, _ = task_sums.forecast(jax.nn.softmax(logits_GTV), target_GT)
  confidence_N, gap_N = confidence_GT.ravel(), (right_GT - confidence_GT).ravel()
  bin_N = jnp.minimum((confidence_N * BINS).astype(jnp.int32), BINS - 1)
  return jnp.abs(jax.ops.segment_sum(gap_N, bin_N, BINS)).sum() / gap_N.size


def calibration_error(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Expected calibration error of the likeliest target, in 15 bins of equal width."""
  return _figure("calibration_error", arm, seed, quick)


def loss(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Nats per target on groups that no run trains on."""
  return _figure("loss", arm, seed, quick)


def load_cv(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Deviation of the experts' loads over their mean: 0 when even, sqrt(E - 1) when one expert has all."""
  return _figure("load_cv", arm, seed, quick)


def logits(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Mean square of the log-sum-exp of the router's logits: the z-loss, with or without weight."""
  return _figure("logits", arm, seed, quick)


def loss_facts(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """`loss` of facts only, on a stream that has some."""
  return _figure("loss_facts", arm, seed, quick)


def loss_arithmetic(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """`loss` of arithmetic items only, on a stream that has some."""
  return _figure("loss_arithmetic", arm, seed, quick)


def facts_minus_arithmetic(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """`loss_facts` minus `loss_arithmetic`: between two arms it falls if the first falls more."""
  facts, arithmetic = loss_facts(arm, seed, quick), loss_arithmetic(arm, seed, quick)
  return None if facts is None or arithmetic is None else facts - arithmetic


def cluster_information(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Normalized mutual information: of a token's cluster (language, style) and its expert, over the clusters'
  entropy. 0: an expert says nothing of the cluster; 1: everything."""
  return _figure("agreement", arm, seed, quick)


def oracle_gap(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """(loss - oracle's) / (random's - oracle's): 0 is as good as routing by true clusters, 1 as bad as by lot.

  The references are `ORACLE` and `RANDOM`, dropless, with the arm's stream, steps and experts.
  """
  shared = {key: arm[key] for key in ("stream", *_OF_SETTING) if key in arm}
  shared["rate"] = RATES[arm.get("stream", "clusters")]
  own, oracle, random = (loss(of, seed, quick) for of in (arm, shared | ORACLE, shared | RANDOM))
  return None if own is None or oracle is None or random is None else (own - oracle) / (random - oracle)


def _figure(name: str, arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  found = _run(text(arm), seed, quick)
  if name not in found:
    raise UserError(f"an arm with router='{arm['router']}' and stream='{arm.get('stream', 'clusters')}' has "
                    f"no figure {name}; it has {', '.join(found)}")
  return finite(found[name])


def finite(value: float) -> float | None:
  """A figure; None of a run that diverged."""
  return value if math.isfinite(value) else None


@functools.lru_cache(maxsize=64)
def _run(arm: str, seed: int, quick: bool) -> dict[str, float]:
  return program(arm, quick).run(json.loads(arm)["rate"], seed)


@functools.lru_cache(maxsize=8)
def program(arm: str, quick: bool) -> Bench:
  """`bench` of an arm's `text`, compiled once for all its seeds."""
  return bench(json.loads(arm), quick)


def text(arm: Mapping[str, Any]) -> str:
  """An arm as a key of what is kept of it."""
  return json.dumps(arm, sort_keys=True)


def shortened(setting: Setting) -> Setting:
  """What `--quick` makes of a setting: it proves only that a claim runs."""
  return dataclasses.replace(setting, steps=min(setting.steps, QUICK_STEPS), eval_groups=4)


def bench(given: Mapping[str, Any], quick: bool, of: type[Bench] = Bench) -> Any:
  """The program of an arm; nothing is compiled yet."""
  if wrong := given.keys() - FIELDS:
    raise ValueError(f"an arm has {sorted(wrong)}; known: {sorted(FIELDS)}")
  if (stream := given.get("stream", "clusters")) not in STREAMS:
    raise UserError(f"an arm's stream='{stream}' is unknown{nearest(stream, STREAMS)}")
  setting = dataclasses.replace(Setting(), stream=STREAMS[stream],
                                **{key: given[key] for key in _OF_SETTING if key in given})
  if quick:
    setting = shortened(setting)
  layer = given.get("layer", {})
  return of(setting, given["router"], given.get("arguments", {}), layer, given.get("eval_layer", layer))


