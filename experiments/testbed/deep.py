"""Figures of a stack of feed-forward blocks on a stream: trained, then tuned on few examples of a new task.

An arm: `blocks`, a letter per block, "d" for a dense FFN and "s" for a sparse layer; `router`, `rate`, and
other fields where they differ from DEFAULTS. `frozen`: beginnings of names of parameters that stay as they
start, such as "sparse_1/router". `update_clip`: the largest root mean square of a parameter's update (Shazeer
and Stern 2018, section 6, here with Adam). `tune`: fields of TUNE; then figures are of the tuned net.

The new task: the same images with other names for what they show, the same names in all styles. What a net
knows of digits helps, what it remembers of names does not.
"""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from experiments.routers_side_by_side.train import Program, Setting
from experiments.testbed.measure import finite, shortened, text
from sparse_experts.data.testbeds import STREAMS
from sparse_experts.data.testbeds.stream import Batch, World
from sparse_experts.errors import UserError, nearest
from sparse_experts.models.blocks import FeedForward, RMSNorm
from sparse_experts.models.functions import dropout
from sparse_experts.models.template import Routings, Tree, fold
from sparse_experts.moe import Experts, MoELayer, Tokens, make_router

# Widths are those of a block: dense FFNs and experts have the same.
DEFAULTS: dict[str, Any] = {
    "stream": "composites", "arguments": {}, "layer": {}, "eval_layer": {}, "experts": 8, "expert_dim": 32,
    "steps": 1000, "groups": 8, "frozen": (), "dropout": 0.0, "expert_dropout": 0.0, "update_clip": math.inf,
    "tune": None}
# examples: groups of 64 tokens, all that the new task has; groups: of a batch; only: a key of PARTS.
TUNE: dict[str, Any] = {"examples": 64, "steps": 200, "groups": 4, "rate": 0.003, "only": "all",
                        "dropout": 0.0, "expert_dropout": 0.0, "layer": {}}
PARTS = {"all": lambda name: True, "experts": lambda name: name.startswith("sparse"),
         "others": lambda name: not name.startswith("sparse")}


class Stack(nnx.Module):
  """x + ffn(norm(x)) for each letter of `blocks`, then a norm and a head.

  drop: of what each block adds, and of dense hidden units; expert_drop: of experts' hidden units.
  """

  def __init__(self, setting: Setting, blocks: str, name: str, arguments: Mapping[str, Any],
               layer: Mapping[str, Any], drop: float, expert_drop: float, key: Array):
    d, f = setting.stream.embed_dim, setting.expert_dim
    self.blocks, self.drop = blocks, drop
    for i, block in enumerate(blocks):
      rngs = lambda part, i=i: nnx.Rngs(fold(key, f"{part}_{i}"))
      setattr(self, f"norm_{i}", RMSNorm(d))
      if block == "s":
        router = make_router(name, d, setting.experts, rngs=rngs("router"), **arguments)
        experts = Experts(setting.experts, d, f, dropout=expert_drop, rngs=rngs("experts"))
        setattr(self, f"sparse_{i}", MoELayer(router, experts, **layer))
      else:
        setattr(self, f"dense_{i}", FeedForward(d, f, "relu", dropout=drop, key=fold(key, f"dense_{i}")))
    self.last_norm = RMSNorm(d)
    self.head = nnx.Param(jax.random.normal(fold(key, "head"), (d, setting.stream.targets)) / d**0.5)

  @property
  def sparse_layers(self) -> dict[str, MoELayer]:
    names = [f"sparse_{i}" for i, block in enumerate(self.blocks) if block == "s"]
    return {name: getattr(self, name) for name in names}

  def __call__(self, x_GTD: Array, tokens: Tokens, key: Array | None = None) -> tuple[Array, Routings]:
    routings = {}
    for i, block in enumerate(self.blocks):
      h_GTD, own = getattr(self, f"norm_{i}")(x_GTD), fold(key, f"block_{i}")
      if block == "s":
        y_GTD, routings[f"sparse_{i}"] = getattr(self, f"sparse_{i}")(h_GTD, tokens, own)
      else:
        y_GTD = getattr(self, f"dense_{i}")(h_GTD, own)
      x_GTD += dropout(y_GTD, self.drop, fold(own, "out"))
    return self.last_norm(x_GTD) @ self.head[...], routings


class Deep(Program):
  """The program of an arm; `first`: the one whose parameters it starts from, to be tuned to the new task."""

  def __init__(self, given: Mapping[str, Any], quick: bool, first: "Deep | None" = None):
    self.given, self.first = given, first
    stream = STREAMS[given["stream"]]
    setting = Setting(stream=stream, experts=given["experts"], expert_dim=given["expert_dim"],
                      groups=given["groups"], steps=given["steps"])
    if quick:
      setting = shortened(setting)
    net = lambda layer, drop, expert_drop: functools.partial(
        Stack, setting, given["blocks"], given["router"], given["arguments"], layer, drop, expert_drop)
    super().__init__(setting, given["router"], {}, measured=net(given["eval_layer"], 0.0, 0.0),
                     net=net(given["layer"], given["dropout"], given["expert_dropout"]))

  def _start(self, seed: int) -> tuple[Tree, Tree, World, Batch, Array]:
    params, buffers, world, batches, noise = super()._start(seed)
    if self.first is None:
      return params, buffers, world, batches, noise
    params, buffers = self.first.trained(self.first.given["rate"], seed)
    key = fold(noise, "tune")
    n, setting = self.given["examples"], self.setting
    examples = setting.stream.batches(world, fold(key, "examples"), (n,))
    epochs = -(-setting.steps * setting.groups // n)
    order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(n) for epoch in range(epochs)])
    at = order[:setting.steps * setting.groups].reshape(setting.steps, setting.groups)
    return params, buffers, world, jax.tree.map(lambda a: a[at], examples), key

  def _world(self, key: Array) -> Any:
    """That of the seed; of an arm that is tuned, with the names of the new task."""
    world = super()._world(key)
    if self.first is None:
      return world
    other = self.setting.stream.world(fold(key, "new task"))
    return world.replace(name_NL=jnp.broadcast_to(other.name_NL[:1], world.name_NL.shape))

  def _moved(self, updates: Tree) -> Tree:
    part, clip = PARTS[self.given.get("only", "all")], self.given["update_clip"]

    def moved(name: str, update: Array) -> Array:
      if not part(name) or name.startswith(tuple(self.given["frozen"])):
        return jnp.zeros_like(update)
      return update / jnp.maximum(1, jnp.sqrt(jnp.mean(update**2)) / clip) if clip < math.inf else update

    flat = flatten_dict(updates)
    return unflatten_dict({path: moved("/".join(path), update) for path, update in flat.items()})


def loss(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Nats per target that no run trains on; with `tune`, of the new task after tuning."""
  return finite(_run(text(arm), seed, quick)["loss"])


def batch_and_rate(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Loss of the new task after tuning as `large` says, minus that as `small` says; both change `tune`.

  Above 0: the net wants the small batch and its rate.
  """
  own = {key: value for key, value in arm.items() if key not in ("large", "small")}
  large, small = (loss({**own, "tune": own["tune"] | arm[way]}, seed, quick) for way in ("large", "small"))
  return None if large is None or small is None else large - small


def at_equal_upstream_loss(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Loss of the new task minus that of a dense net of the same loss upstream; 0 for an arm without `ladder`.

  Interpolated between dense nets of the widths `ladder`; no figure outside of their losses.
  """
  if "ladder" not in arm:
    return 0.0
  own = {key: value for key, value in arm.items() if key != "ladder"}
  dense = [own | {"blocks": "d" * len(own["blocks"]), "expert_dim": width} for width in arm["ladder"]]
  both = lambda of: (loss({**of, "tune": None}, seed, quick), loss(of, seed, quick))
  (upstream, downstream), rungs = both(own), sorted(both(of) for of in dense)
  above, below = zip(*rungs, strict=True)
  if not quick and not above[0] <= upstream <= above[-1]:
    return None
  return downstream - float(np.interp(upstream, above, below))


@functools.lru_cache(maxsize=256)
def _run(arm: str, seed: int, quick: bool) -> dict[str, float]:
  program = _program(arm, quick)
  return program.run(program.given["rate"], seed)


@functools.lru_cache(maxsize=16)
def _program(arm: str, quick: bool) -> Deep:
  given = _filled(json.loads(arm), DEFAULTS, {"blocks", "router", "rate"}, "an arm")
  if set(given["blocks"]) - set("ds"):
    raise UserError(f"an arm's blocks='{given['blocks']}': a letter per block, d (dense) or s (sparse)")
  if given["stream"] not in STREAMS:
    raise UserError(f"an arm's stream='{given['stream']}' is unknown{nearest(given['stream'], STREAMS)}")
  if given["tune"] is None:
    return _Cached(given, quick)
  if given["stream"] != "composites":
    raise UserError(f"an arm with stream='{given['stream']}' cannot be tuned; only composites have a new "
                    "task")
  tune = _filled(given["tune"], TUNE, set(), "an arm's tune")
  first = json.dumps({**json.loads(arm), "tune": None}, sort_keys=True)
  return Deep(given | {"frozen": (), **tune}, quick, _program(first, quick))


class _Cached(Deep):
  """Trained once for all that is tuned from it."""

  @functools.lru_cache(maxsize=64)  # noqa: B019 - programs live as long as the process
  def trained(self, *args: Any, **kwargs: Any) -> tuple[Tree, Tree]:
    return super().trained(*args, **kwargs)


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any], needed: set[str], what: str
            ) -> dict[str, Any]:
  if wrong := given.keys() - defaults.keys() - needed:
    raise UserError(f"{what} has {sorted(wrong)}; known: {sorted(defaults.keys() | needed)}")
  if missing := needed - given.keys():
    raise UserError(f"{what} lacks {sorted(missing)}")
  return dict(defaults) | dict(given)
