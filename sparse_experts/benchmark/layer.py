"""Times a sparse layer against its floor: only its experts' products over exactly T·k rows.

The floor is `Experts.batched` on [E, T·k/E, D]: the same framework, weights, dtype and activation, without
empty slots and without moving rows. Everything is timed in the same rounds, on one device. Backward is a vjp
with given cotangents of the output and of the router's losses; a loss such as Σ y² would be fused into the
products.

Made-up tokens meet an untrained router, whose loads are uneven by chance. `choose` makes tokens that the same
router sends where those of a trained run went.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_experts.benchmark.timing import Program, interleave
from sparse_experts.errors import UserError
from sparse_experts.moe import ACTIVATIONS, DISPATCHES, Experts, MoELayer, Router, Routing, Tokens, TopKRouter
from sparse_experts.moe.routing import as_pair


@dataclasses.dataclass(frozen=True)
class Workload:
  """A layer's shapes. Capacity counts k: int(factor · T · k / E) slots, MegaBlocks' rule; None: dropless."""

  tokens: int
  embed_dim: int
  expert_dim: int
  num_experts: int
  k: int
  activation: str
  capacity_factor: float | None = None
  group_size: int | None = None  # None: all tokens are one group
  dtype: str = "float32"
  backend: str | None = None  # of ragged's products; None: the platform's own
  dispatches: tuple[str, ...] = tuple(DISPATCHES)

  @property
  def rows(self) -> int:
    return self.tokens * self.k

  @property
  def products(self) -> int:
    """Matrices of an expert."""
    return 3 if ACTIVATIONS[self.activation][1] else 2

  @property
  def flops(self) -> int:
    """Of the experts' products forward, 2 per multiply-add; forward and backward take three times as many."""
    return 2 * self.rows * self.embed_dim * self.expert_dim * self.products


# Dropless, scatter and einsum reserve T slots for every expert, which is too slow with many experts.
WORKLOADS = {
    "switch": Workload(4096, 512, 2048, 8, 1, "relu", 1.25),
    "st_moe": Workload(4096, 512, 2048, 16, 2, "geglu", 1.25),
    "fine_grained": Workload(4096, 512, 256, 64, 8, "swiglu", dispatches=("ragged",)),
    "st_moe_large": Workload(65536, 2048, 8192, 16, 2, "geglu", dtype="bfloat16", dispatches=("ragged",)),
    "fine_grained_large": Workload(65536, 2048, 1024, 64, 8, "swiglu", dtype="bfloat16",
                                   dispatches=("ragged",)),
}


class Identity(Experts):
  """Experts that return their rows: times a layer's router and dispatch alone."""

  def __init__(self, num_experts: int):
    self.num_experts, self.dropout, self.backend = num_experts, 0.0, None

  def batched(self, x_ECD, dropout=None):
    return x_ECD

  def grouped(self, x_PD, layout, dropout=None):
    return x_PD


def make_experts(w: Workload) -> Experts:
  """Experts with weights drawn by numpy: jitted initialisation takes longer to compile than all else here."""
  experts = nnx.eval_shape(lambda: Experts(
      w.num_experts, w.embed_dim, w.expert_dim, w.activation, backend=w.backend, rngs=nnx.Rngs(params=0)))
  graphdef, abstract = nnx.split(experts)
  rng = np.random.default_rng(0)
  draw = lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32) * a.shape[1]**-0.5)
  return nnx.merge(graphdef, jax.tree.map(draw, abstract))


def make_layer(w: Workload, experts: Experts, dispatch: str) -> MoELayer:
  router = TopKRouter(w.embed_dim, w.num_experts, k=w.k, rngs=nnx.Rngs(params=0))
  return MoELayer(
      router, experts, dispatch, w.group_size or w.tokens, w.capacity_factor, capacity_rule="megablocks")


def inputs(w: Workload) -> jax.Array:
  """x_GTD."""
  size = w.group_size or w.tokens
  if w.tokens % size or w.rows % w.num_experts:
    raise ValueError(f"{w}: groups divide tokens, and experts divide rows")
  x = np.random.default_rng(1).standard_normal((w.tokens // size, size, w.embed_dim), np.float32)
  return jnp.asarray(x, w.dtype)


def choose(layer: MoELayer, x_GTD: jax.Array, expert_NK: np.ndarray) -> tuple[MoELayer, jax.Array]:
  """The layer with another router matrix, and x with other first E numbers: token n goes to expert_NK[n].

  The matrix reads a token's logits from these numbers: K for its first choice, 1 for its last, else 0.
  """
  (G, T, D), (N, K), E = x_GTD.shape, expert_NK.shape, layer.num_experts
  logit_NE = np.zeros((N, E), np.float32)
  np.put_along_axis(logit_NE, expert_NK, np.arange(K, 0, -1, dtype=np.float32), axis=1)
  graphdef, state = nnx.split(layer)
  chosen = nnx.merge(graphdef, state)
  assert isinstance(chosen.router, TopKRouter)
  chosen.router.w[...] = jnp.eye(D, E)
  return chosen, x_GTD.at[..., :E].set(logit_NE.reshape(G, T, E).astype(x_GTD.dtype))


def both_ways(call: Callable[..., Any], *arguments: Any) -> dict[str, Program]:
  """{"forward", "forward_backward"} of `call`, whose results are a tree of floats and one of anything.

  Gradients are of all arguments, for cotangents that are arguments too. The second tree is computed,
  so that it is not optimised away, and has no gradient.
  """
  forward = Program(call, arguments)
  shapes = jax.eval_shape(call, *arguments)[0]
  cotangents = jax.tree.map(lambda a: jnp.full(a.shape, 0.5, a.dtype), shapes)

  def gradients(cotangents, *arguments):
    outputs, pull, rest = jax.vjp(call, *arguments, has_aux=True)
    return outputs, rest, pull(cotangents)

  return {"forward": forward, "forward_backward": Program(gradients, (cotangents, *arguments))}


def _by_params(module: nnx.Module) -> tuple[Callable[[Any], Any], Any]:
  """(a function from parameters to the module with them, its parameters)."""
  graphdef, *states = nnx.split(module, nnx.Param, ...)
  return lambda params: nnx.merge(graphdef, params, *states[1:]), states[0]


def layer_programs(layer: MoELayer, x_GTD: jax.Array) -> dict[str, Program]:
  build, params = _by_params(layer)

  def call(x_GTD, params):
    y_GTD, routing = build(params)(x_GTD)
    return (y_GTD, weighted(layer, routing)), None

  return both_ways(call, x_GTD, params)


def weighted(layer: MoELayer | Router, routing: Routing) -> jax.Array:
  """The losses of a layer or router, as they enter a training loss."""
  pairs = {name: as_pair(loss) for name, loss in routing.losses.items()}
  return sum((layer.loss_weights.get(name, 0.0) * total / count for name, (total, count) in pairs.items()),
             jnp.zeros(()))


def router_programs(router: Router, x_GTD: jax.Array, capacity: int | None, tokens: Tokens | None = None,
                    key: jax.Array | None = None) -> dict[str, Program]:
  """A router alone: its list, gates, losses, log-probabilities and values, and their gradients."""
  tokens = tokens or Tokens(mask=jnp.ones(x_GTD.shape[:2], bool))
  build, params = _by_params(router)

  def call(x_GTD, params):
    routing = build(params)(x_GTD, tokens, capacity, key)
    floats = routing.gate, routing.log_prob, routing.value, weighted(router, routing)
    return floats, (routing.token, routing.expert, routing.valid)

  return both_ways(call, x_GTD, params)


def floor_programs(w: Workload, experts: Experts) -> dict[str, Program]:
  graphdef, params = nnx.split(experts)
  shape = (w.num_experts, w.rows // w.num_experts, w.embed_dim)
  x_ECD = jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32), w.dtype)
  programs = both_ways(lambda x, params: (nnx.merge(graphdef, params).batched(x), None), x_ECD, params)
  check_products(programs["forward"].compiled, w.flops, w.products)
  check_products(programs["forward_backward"].compiled, 3 * w.flops, 3 * w.products)
  return programs


def check_products(compiled: jax.stages.Compiled, flops: int, products: int) -> None:
  """Raises UserError unless all products are computed: by the compiler's count of FLOPs or, where that leaves
  out a library's products (on GPUs), by their number in the program."""
  counted = (compiled.cost_analysis() or {}).get("flops", 0.0)
  present = len(re.findall(r" dot\(|custom_call_target=\"__cublas", compiled.as_text() or ""))
  if counted < flops and not (present >= products and jax.default_backend() == "gpu"):
    raise UserError(f"the compiled floor has {counted:,.0f} FLOPs in {present} products and needs {flops:,} "
                    f"in {products}: the compiler left a part out; no ratio is given")


def matmul_program(dtype: str) -> tuple[Program, int]:
  """(a square product of the dtype, its FLOPs), for the best rate of this machine."""
  n = 2048 if jax.default_backend() == "cpu" else 8192
  a, b = (jnp.asarray(np.random.default_rng(i).standard_normal((n, n), np.float32), dtype) for i in (3, 4))
  return Program(jnp.matmul, (a, b)), 2 * n**3


def routing_facts(layer: MoELayer, x_GTD: jax.Array) -> dict[str, float]:
  graphdef, state = nnx.split(layer)
  metrics = jax.jit(lambda x, state: nnx.merge(graphdef, state)(x)[1].metrics)(x_GTD, state)
  load_E = np.asarray(metrics["load"][0])
  dropped = metrics["dropped"]
  return {"load_max_mean": float(load_E.max() / load_E.mean()), "dropped": float(dropped[0] / dropped[1])}


def memory(w: Workload, program: Program) -> dict[str, float]:
  """MiB of one device in forward and backward: what the program holds, and the least that it must hold."""
  sizes = program.compiled.memory_analysis()
  assert sizes is not None  # every backend has it
  held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
  x_GTD, params = program.arguments[-2:]
  inputs_and_weights = sum(a.nbytes for a in jax.tree.leaves((x_GTD, params)))
  least = 2 * inputs_and_weights + w.rows * w.embed_dim * x_GTD.dtype.itemsize
  return {"memory_mib": held / 2**20, "memory_least_mib": least / 2**20, "memory_over_least": held / least}


def measure(w: Workload, runs: int, dispatches: Sequence[str] | None = None,
            routings: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
  """The workload's shapes, and per dispatch what docs/measures.md defines under `benchmark layer`.

  routings: name -> expert_NK of a trained run; `routings` of the results has the same figures of each.
  """
  dispatches = w.dispatches if dispatches is None else dispatches
  experts, made_up_GTD = make_experts(w), inputs(w)
  programs: dict[tuple[str, ...], Program] = {
      ("floor", way): p for way, p in floor_programs(w, experts).items()}
  matmul, matmul_flops = matmul_program(w.dtype)
  programs["matmul",] = matmul
  facts = {}
  for name in dispatches:
    layer, empty = make_layer(w, experts, name), make_layer(w, Identity(w.num_experts), name)
    for routing, expert_NK in {"": None, **(routings or {})}.items():
      to = lambda layer, expert_NK=expert_NK: (
          (layer, made_up_GTD) if expert_NK is None else choose(layer, made_up_GTD, expert_NK))
      facts[routing, name] = routing_facts(*to(layer)) | {
          "rows_over_floor": layer.rows_per_token(w.tokens) / w.k}
      made = layer_programs(*to(layer)) | {"moves": layer_programs(*to(empty))["forward_backward"]}
      for way, program in made.items():
        first = programs.get(("", name, way))
        programs[routing, name, way] = program if first is None else first.on(program.arguments)
  router = make_layer(w, experts, "ragged")
  programs["router",] = router_programs(
      router.router, made_up_GTD, router.capacity(made_up_GTD.shape[1]))["forward_backward"]
  times = interleave(programs, runs)

  flops, rate = 3 * w.flops, lambda flops, sample: flops / sample.median / 1e9  # ms -> TFLOP/s

  def figures(routing: str, name: str) -> dict[str, Any]:
    ours, moves = times[routing, name, "forward_backward"], times[routing, name, "moves"]
    found: dict[str, Any] = {}
    for way in ("forward", "forward_backward"):
      sample, floor = times[routing, name, way], times["floor", way]
      found |= (sample.named(f"{way}_ms") | floor.named(f"floor_{way}_ms")
                | sample.over(floor).named(f"{way}_over_floor"))
    return found | {"router_dispatch_ms": moves.median, "router_dispatch_share": moves.over(ours).median,
                    "tflops": rate(flops, ours)} | facts[routing, name]

  dropless = programs.get(("", "ragged", "forward_backward"))
  if dropless is None or w.capacity_factor is not None:
    layer = make_layer(dataclasses.replace(w, capacity_factor=None), experts, "ragged")
    dropless = layer_programs(layer, made_up_GTD)["forward_backward"]
  of_runs = {"routings": {routing: {name: figures(routing, name) for name in dispatches}
                          for routing in routings}} if routings else {}
  return dataclasses.asdict(w) | {
      "runs": runs, "dispatches": {name: figures("", name) for name in dispatches}, **of_runs,
      "router_ms": times["router",].median,
      "floor_tflops": rate(flops, times["floor", "forward_backward"]),
      "matmul_tflops": rate(matmul_flops, times["matmul",]),
  } | memory(w, dropless)
