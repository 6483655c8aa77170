"""One arm as a program that knows no seed, rate or number of steps: compiled once, run for all of them."""

import dataclasses
import functools
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from experiments.routers_side_by_side.arms import DENSE
from sparse_experts.data.testbeds import Clusters, Stream
from sparse_experts.data.testbeds.stream import Batch, World
from sparse_experts.models.template import Routings, Template, Tree, fold
from sparse_experts.moe import LAYERS, Experts, MoELayer, Tokens, make_layer, make_router
from sparse_experts.tasks import sums as task_sums
from sparse_experts.training import objectives


@dataclasses.dataclass(frozen=True)
class Setting:
  """What all arms share."""

  stream: Stream = dataclasses.field(default_factory=Clusters)
  experts: int = 8
  expert_dim: int = 16
  groups: int = 8  # of a batch
  steps: int = 1000
  eval_groups: int = 256
  extra_ffn: bool = False  # behind the layer, as ST-MoE's

  @property
  def group_tokens(self) -> int:
    return self.stream.clusters * self.stream.length

  @property
  def tokens(self) -> int:
    """That a run trains on."""
    return self.steps * self.groups * self.group_tokens


class Net(nnx.Module):
  """logits = (x + layer(x)) head. layer: arguments of MoELayer, such as a capacity.

  With `setting.extra_ffn` a dense FFN as wide as an expert follows the layer, with a residual of its own.
  """

  def __init__(self, setting: Setting, name: str, arguments: dict[str, Any], key: Array,
               layer: Mapping[str, Any] = MappingProxyType({})):
    d, targets = setting.stream.embed_dim, setting.stream.targets
    make_experts = lambda n: Experts(n, d, setting.expert_dim, rngs=nnx.Rngs(fold(key, "experts")))
    self.length = None
    if name == DENSE:
      self.layer = make_experts(1)
    elif name in LAYERS:  # whose rows are examples: a sequence each
      self.length = setting.stream.length
      self.layer = make_layer(name, d, make_experts(setting.experts), rngs=nnx.Rngs(fold(key, "router")),
                              **arguments)
    else:
      router = make_router(name, d, setting.experts, rngs=nnx.Rngs(fold(key, "router")), **arguments)
      self.layer = MoELayer(router, make_experts(setting.experts), **layer)
    has = setting.extra_ffn
    self.extra = Experts(1, d, setting.expert_dim, rngs=nnx.Rngs(fold(key, "extra"))) if has else None
    self.head = nnx.Param(jax.random.normal(fold(key, "head"), (d, targets)) / d**0.5)

  @property
  def sparse_layers(self) -> dict[str, Any]:
    return {} if isinstance(self.layer, Experts) else {"layer": self.layer}

  def __call__(self, x_GTD: Array, tokens: Tokens, key: Array | None = None) -> tuple[Array, Routings]:
    routings = {}
    if isinstance(self.layer, Experts):
      y_GTD = self.layer.batched(x_GTD.reshape(1, -1, x_GTD.shape[-1])).reshape(x_GTD.shape)
    elif self.length is not None:
      y_BLD, routings["layer"] = self.layer(x_GTD.reshape(-1, self.length, x_GTD.shape[-1]), None, key)
      y_GTD = y_BLD.reshape(x_GTD.shape)
    else:
      y_GTD, routings["layer"] = self.layer(x_GTD, tokens, key)
    x_GTD += y_GTD
    if self.extra is not None:
      x_GTD += self.extra.batched(x_GTD.reshape(1, -1, x_GTD.shape[-1])).reshape(x_GTD.shape)
    return x_GTD @ self.head[...], routings


class Program:
  """An arm: `run` trains and measures it.

  net: what makes another network from a key, with `sparse_layers` and the call of `Net`. measured: the one
  that is measured with the trained parameters, if it is not the same.
  """

  def __init__(self, setting: Setting, name: str, arguments: dict[str, Any],
               layer: Mapping[str, Any] = MappingProxyType({}), net: Callable[[Array], Any] | None = None,
               measured: Callable[[Array], Any] | None = None):
    self.setting = setting
    net = net or functools.partial(Net, setting, name, arguments, layer=layer)
    self.template: Template[Any] = Template(net)
    self.measured = self.template if measured is None else Template(measured)
    self._train, self._measure = jax.jit(self._steps), jax.jit(self._measures)

  @functools.cached_property
  def key(self) -> str:
    """A hash of everything a result depends on but rate and seed: of the text of what is compiled."""
    start, frozen = jax.eval_shape(lambda: (self._start(0), self.frozen(0)))
    lowered = (
        jax.jit(lambda seed: (self._start(seed), self.frozen(seed))).lower(0),
        self._train.lower(*start, 0.0, 0), self._measure.lower(*start[:2], *frozen))
    text = jax.__version__ + str(self.setting.steps) + "".join(part.as_text() for part in lowered)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def run(self, rate: float, seed: int, steps: int | None = None,
          change: Callable[[Tree], Tree] = lambda params: params) -> dict[str, float]:
    """What is measured after training. steps: fewer than the setting's; change: of the initial parameters."""
    params, buffers = self.trained(rate, seed, steps, change)
    found = self._measure(params, buffers, *self.frozen(seed))
    return {name: float(value) for name, value in found.items()}

  def trained(self, rate: float, seed: int, steps: int | None = None,
              change: Callable[[Tree], Tree] = lambda params: params) -> tuple[Tree, Tree]:
    """(params, buffers) after training, as for `run`."""
    params, *rest = self._start(seed)
    return self._train(change(params), *rest, rate, steps or self.setting.steps)

  def _start(self, seed: int) -> tuple[Tree, Tree, World, Batch, Array]:
    """params, buffers, what the seed draws once, the batches of its run, and the key of routers' noise."""
    stream, key = self.setting.stream, jax.random.key(seed)
    world = self._world(key)
    batches = stream.batches(world, fold(key, "train"), (self.setting.steps, self.setting.groups))
    return *self.template.init(fold(key, "init")), world, batches, fold(key, "noise")

  def frozen(self, seed: int) -> tuple[World, Batch]:
    """Groups that no run trains on."""
    stream, key = self.setting.stream, jax.random.key(seed)
    world = self._world(key)
    return world, stream.batches(world, fold(key, "eval"), (self.setting.eval_groups,))

  def _world(self, key: Array) -> Any:
    return self.setting.stream.world(fold(key, "world"))

  def _steps(self, params: Tree, buffers: Tree, world: World, batches: Batch, key: Array, rate: Array,
             steps: Array) -> tuple[Tree, Tree]:
    """(params, buffers) after that many steps of Adam; the rate falls linearly to 0."""
    adam, weights = optax.scale_by_adam(), self._weights()

    def loss(params, buffers, batch, key):
      logits_GTV, routings = self.template.bind(params, buffers)(world.vectors(batch), batch.tokens, key)
      ce_GT = self._token_loss(logits_GTV, world, batch)
      one_GT = jnp.ones_like(ce_GT)
      rewards = lambda name, routing: task_sums.token_rewards(name, routing, ce_GT, {"weights": one_GT})
      sums = {"loss": (ce_GT.sum(), one_GT.sum()), "layers": task_sums.layer_sums(routings, rewards)}
      return objectives.total(sums, objectives.whole(sums), weights, dict.fromkeys(weights, "sum"))[0], sums

    def step(i, carry):
      params, buffers, state = carry
      batch = jax.tree.map(lambda a: a[i], batches)
      gradient, sums = jax.grad(loss, has_aux=True)(params, buffers, batch, fold(key, i))
      updates, state = adam.update(gradient, state, params)
      updates = self._moved(updates)
      size = rate * (1 - i / steps)
      params = jax.tree.map(lambda p, u: p - size * u, params, updates)
      return params, self._next_buffers(params, buffers, sums), state

    return jax.lax.fori_loop(0, steps, step, (params, buffers, adam.init(params)))[:2]

  def _token_loss(self, logits_GTV: Array, world: World, batch: Batch) -> Array:
    return task_sums.cross_entropy(logits_GTV, batch.target_GT)

  def _moved(self, updates: Tree) -> Tree:
    """Adam's updates as they are applied."""
    return updates

  def _weights(self) -> dict[str, dict[str, float]]:
    return {name: {loss: weight for loss, weight in layer.loss_weights.items() if weight}
            for name, layer in self.template.module.sparse_layers.items()}

  def _next_buffers(self, params: Tree, buffers: Tree, sums: Tree) -> Tree:
    layers, after = self.template.module.sparse_layers, {}
    for name, state in buffers.items():
      found, learnt = sums["layers"][name], params[name].get("router", {})
      router = layers[name].router
      after[name] = {"router": router.next_state(state["router"], learnt, found["metrics"], found["stats"])}
    return after

  def _measures(self, params: Tree, buffers: Tree, world: World, batch: Batch) -> dict[str, Array]:
    """Without noise; of the last sparse layer. What an arm does not have is left out."""
    logits_GTV, routings = self.measured.bind(params, buffers)(world.vectors(batch), batch.tokens)
    ce_GT = task_sums.cross_entropy(logits_GTV, batch.target_GT)
    found = {"loss": ce_GT.mean()}
    for kind, of_kind_GT in self.setting.stream.kinds(batch).items():
      found[f"loss_{kind}"] = ce_GT.mean(where=of_kind_GT)
    if not routings:
      return found
    routing = list(routings.values())[-1]
    ratio = lambda name: routing.metrics[name][0] / routing.metrics[name][1]
    found |= {"unserved": ratio("token_dropped")}
    if routing.token is None:
      return found
    cluster_GA = jnp.take_along_axis(batch.tokens.task, routing.token, axis=1)
    expert_GAE = jax.nn.one_hot(routing.expert, self.setting.experts) * routing.kept[..., None]
    count_NE = jnp.einsum("gan,gae->ne", jax.nn.one_hot(cluster_GA, self.setting.stream.clusters), expert_GAE)
    load_E = count_NE.sum(0)
    return found | {
        "experts_per_token": ratio("experts_per_token"), "agreement": agreement(count_NE),
        "load_cv": load_E.std() / load_E.mean()}


def step_seconds(programs: Sequence[Program], steps: int = 50, rounds: int = 7) -> list[float]:
  """Medians over rounds in which the programs take turns; from the seed's first values on."""
  starts = [program._start(0) for program in programs]
  took = [[] for _ in programs]
  for turn in range(rounds + 1):
    for program, start, times in zip(programs, starts, took, strict=True):
      begin = time.perf_counter()
      jax.block_until_ready(program._train(*start, 1e-3, steps))
      if turn:  # the first one may compile
        times.append((time.perf_counter() - begin) / steps)
  return [statistics.median(times) for times in took]


def agreement(count_NE: Array) -> Array:
  """Mutual information of cluster and expert over the clusters' entropy: the share of it that experts tell.

  Of assignments; 1 if no two clusters share an expert, 0 if all have the same shares of experts.
  """
  p_NE = count_NE / count_NE.sum()
  entropy = lambda p: -(p * jnp.log(jnp.maximum(p, 1e-30))).sum()
  of_clusters = entropy(p_NE.sum(1))
  return (of_clusters + entropy(p_NE.sum(0)) - entropy(p_NE)) / of_clusters
