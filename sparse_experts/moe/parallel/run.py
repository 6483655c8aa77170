"""Expert parallelism: any dispatch, run on each device's groups, with experts that are elsewhere.

The only file with collectives. A dispatch runs inside `shard_map` on the local groups and is handed
`ExchangedExperts`, which looks like `Experts` and sends rows to the devices that hold the weights and
back. Forward there are two all-to-alls over `expert`, one sum over `model` if it is larger than 1, and
for `grouped` one exchange of sizes; backward the same without the sizes, and the sum of weight gradients
over `data`. Collectives over axes of size 1 are skipped here: the compiler would keep them. A step of
Gating Dropout that stays at home takes the other branch of a conditional, without exchange.

Rows travel in the type of the activations, and so do the parts that are summed over `model`: each is the
rounded result of a product, so a wider sum would double the bytes and still hold their rounding. Gradients
of weights are summed in float32, the type of the weights.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from sparse_experts import partitioning
from sparse_experts.moe.dispatch import Dispatch
from sparse_experts.moe.experts import Dropout, Experts
from sparse_experts.moe.grouped import rows
from sparse_experts.moe.grouped.layout import Layout, sorted_by_expert
from sparse_experts.moe.parallel import exchange
from sparse_experts.moe.parallel.gating_dropout import GatingDropout
from sparse_experts.moe.routing import Routing


def run(
    dispatch: Dispatch, x_GTD: Array, routing: Routing, experts: Experts, capacity: int | None,
    key: Array | None, exchange_rows_factor: float | None, stay: Array | None = None,
    gating: GatingDropout | None = None,
) -> tuple[Array, Array, Array]:
  """(y_GTD, kept_GA, served_GT): the dispatch on every device's groups, and which tokens any expert served.

  Groups spread over data x expert; if they do not divide, groups of zeros, hence not valid, are added
  (evaluation and sampling; training refuses such shapes beforehand).
  stay: `gating`'s coin. Where it is True the list sends tokens to experts of their own machine, and if
    machines fit the mesh nothing is exchanged.
  """

  sizes = _sizes()
  if gating is None or not sizes or not gating.fits(sizes) or x_GTD.shape[0] % _shards(sizes):
    stay = None  # the exchange serves any list

  def local(experts_as, by_group, key, stay):
    x_GTD, routing = by_group

    def go(kind):
      y_GTD, kept_GA = dispatch(x_GTD, routing, experts_as(kind), capacity, key)
      with jax.named_scope("combine"):
        group_G1 = jnp.arange(x_GTD.shape[0])[:, None]
        served_GT = jnp.zeros(x_GTD.shape[:2], bool).at[group_G1, routing.token].max(kept_GA)
      return y_GTD, kept_GA, served_GT

    if stay is None:
      return go(ExchangedExperts)
    return jax.lax.cond(stay, lambda: go(HomeExperts), lambda: go(ExchangedExperts))

  return spread(local, (x_GTD, routing.only_list()), experts, (key, stay), exchange_rows_factor)


def spread(call: Callable[..., Any], by_group: Any, experts: nnx.Module, same: tuple = (),
           exchange_rows_factor: float | None = None) -> Any:
  """`call(experts_as, by_group, *same)` on every device's groups; its results have groups first, too.

  by_group: arrays with groups first. same: arrays that all devices have. `experts_as(ExchangedExperts)` are
  the experts, wherever they are; without a mesh those given.
  """
  sizes = _sizes()
  if not sizes:
    return call(lambda kind: experts, by_group, *same)
  groups, G = _groups(sizes), jax.tree.leaves(by_group)[0].shape[0]
  graphdef, state = nnx.split(experts)
  variables = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
  specs = [_only(partitioning.spec(v.axes), sizes) for v in variables]
  weights, structure = jax.tree.flatten(state)
  if not any("model" in spec for spec in specs):
    sizes.pop("model", None)  # every device along it does the same

  def on_device(by_group, weights, same):
    weights = [_vary(w, spec, sizes) for w, spec in zip(weights, specs, strict=True)]
    mine = nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
    return call(lambda kind: kind(mine, sizes, exchange_rows_factor), by_group, *same)

  outputs = jax.shard_map(
      on_device, mesh=partitioning.current_mesh(), in_specs=(groups, specs, P()), out_specs=groups,
  )(_whole(by_group, sizes), weights, same)
  return jax.tree.map(lambda a: a[:G], outputs)


def by_group(function: Callable[..., Any], *arrays: Array) -> Any:
  """`function(*arrays)`, all with groups first, on each device's own groups; groups of zeros may be added.

  For routers that loop until their groups are done: the compiler would let all devices agree in every round.
  """
  sizes = _sizes()
  if not sizes:
    return function(*arrays)
  groups, G = _groups(sizes), arrays[0].shape[0]
  call = jax.shard_map(function, mesh=partitioning.current_mesh(), in_specs=groups, out_specs=groups)
  return jax.tree.map(lambda a: a[:G], call(*_whole(arrays, sizes)))


def _sizes() -> dict[str, int]:
  """The current mesh's axes that are larger than 1."""
  mesh = partitioning.current_mesh()
  return {} if mesh is None else {name: n for name, n in mesh.shape.items() if n > 1}


def _groups(sizes: dict[str, int]) -> P:
  """Groups spread over data x expert."""
  return P(tuple(a for a in partitioning.BATCH_AXES if a in sizes) or None)


def _shards(sizes: dict[str, int]) -> int:
  return math.prod(sizes.get(a, 1) for a in partitioning.BATCH_AXES)


def _whole(tree: Any, sizes: dict[str, int]) -> Any:
  """With groups of zeros added until they divide over the devices."""
  pad = lambda a: jnp.pad(a, ((0, -a.shape[0] % _shards(sizes)),) + ((0, 0),) * (a.ndim - 1))
  return jax.tree.map(pad, tree)


def _only(spec: P, sizes: dict[str, int]) -> P:
  """`spec` without mesh axes of size 1."""
  return P(*(axis if axis in sizes else None for axis in spec))


def _vary(w: Array, spec: P, sizes: dict[str, int]) -> Array:
  """Marks a weight as varying over all mesh axes; the transpose of that is the sum of its gradient."""
  axes = tuple(a for a in sizes if a not in spec)
  return jax.lax.pcast(w, axes, to="varying") if axes else w


class ExchangedExperts:
  """`Experts` whose weights are spread over `expert` and `model`: same calls, rows exchanged.

  Inside `shard_map`. e: experts held here; n: devices along `expert`; B: rows sent to each of them.
  """

  def __init__(self, experts: Experts, sizes: dict[str, int], exchange_rows_factor: float | None):
    self.here, self.rows_factor = experts, exchange_rows_factor
    self.num_experts = experts.num_experts
    self.n, self.model = sizes.get("expert", 1), sizes.get("model", 1)

  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    E, C, D = x_ECD.shape
    n, e = self.n, E // self.n
    with jax.named_scope("dispatch"):
      packed = _pack(x_ECD, dropout)
      packed = self._all_to_all(packed.reshape(n, e, C, -1)).swapaxes(0, 1).reshape(e, n * C, -1)
      x_eCD, dropout = self._unpack(packed, D, dropout)
    y_eCD = self._sum_model(self.here.batched(self._vary_model(x_eCD), dropout))
    with jax.named_scope("combine"):
      return self._all_to_all(y_eCD.reshape(e, n, C, -1).swapaxes(0, 1)).reshape(E, C, -1)

  def lay_out(self, size_E: Array, R: int, expected: int | None = None) -> Layout:
    """Rows that will travel are sorted by expert; those that stay lie as the experts want them."""
    return (self.here.lay_out if self.n == 1 else sorted_by_expert)(size_E, R, expected)

  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> tuple[Array, Array]:
    R, D = x_PD.shape
    if self.n == 1:
      with jax.named_scope("dispatch"):
        x_PD, dropout = self._unpack(_pack(x_PD, dropout), D, dropout)
      y_PD, served_P = self.here.grouped(self._vary_model(x_PD), layout, dropout)
      return self._sum_model(y_PD), served_P
    n = self.n
    N = n * (R if self.rows_factor is None else min(R, math.ceil(R * self.rows_factor / n)))
    plan = EXCHANGES.get(partitioning.platform(), _exchange_ragged)
    with jax.named_scope("dispatch"):
      there, back, size_e, served_R = plan(_sizes_of_all(layout.size_E), R, N)
      x_ND = there(_pack(x_PD, dropout))
    y_ND = self._here(x_ND, D, size_e, layout.expected, dropout)
    with jax.named_scope("combine"):
      return back(y_ND), served_R

  def _here(self, packed_ND: Array, D: int, size_e: Array, expected: int, dropout: Dropout | None) -> Array:
    """Rows sorted by the experts held here, packed -> their y_ND."""
    N = packed_ND.shape[0]
    with jax.named_scope("dispatch"):
      layout = self.here.lay_out(size_e, N, expected)
      x_PD, dropout = self._unpack(layout.fill(packed_ND), D, dropout)
    y_PD = self._sum_model(self.here.grouped(self._vary_model(x_PD), layout, dropout)[0])
    with jax.named_scope("combine"):
      return layout.take(y_PD, N)

  def _all_to_all(self, a: Array) -> Array:
    return a if self.n == 1 else _all_to_all(a)

  def _vary_model(self, a: Array) -> Array:
    return a if self.model == 1 else jax.lax.pcast(a, "model", to="varying")

  def _sum_model(self, a: Array) -> Array:
    """Each device along `model` holds some hidden units, hence a part of the sum over them."""
    if self.model == 1:
      return a
    with jax.named_scope("experts"):
      return jax.lax.psum(a, "model")

  def _unpack(self, packed: Array, D: int, dropout: Dropout | None) -> tuple[Array, Dropout | None]:
    if dropout is None:
      return packed, None
    digits = packed[..., D:].astype(jnp.uint32)
    byte = jnp.arange(0, 32, 8, dtype=jnp.uint32).reshape((1,) * (digits.ndim - 1) + (4,))
    seed = (digits << byte).sum(-1, dtype=jnp.uint32)
    width = self.here.w_in.shape[-1]
    column = jax.lax.axis_index("model") * width if self.model > 1 else 0
    return packed[..., :D], Dropout(dropout.key, seed, column)


class HomeExperts(ExchangedExperts):
  """The same calls for rows that all want experts held here; the others' are zero. Nothing is exchanged."""

  def _mine(self, a: Array, axis: int = 0) -> Array:
    e = self.num_experts // self.n
    return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("expert") * e, e, axis) if self.n > 1 else a

  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    packed = self._mine(_pack(x_ECD, dropout))
    x_eCD, dropout = self._unpack(packed, x_ECD.shape[-1], dropout)
    y_eCD = self._sum_model(self.here.batched(self._vary_model(x_eCD), dropout))
    if self.n == 1:
      return y_eCD
    nowhere = partitioning.varying_like(jnp.zeros((x_ECD.shape[0], *y_eCD.shape[1:]), y_eCD.dtype), y_eCD)
    return jax.lax.dynamic_update_slice_in_dim(
        nowhere, y_eCD, jax.lax.axis_index("expert") * y_eCD.shape[0], 0)

  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> tuple[Array, Array]:
    if self.n == 1:
      return super().grouped(x_PD, layout, dropout)
    # All sizes but ours are 0, so our rows are the first.
    y_RD = self._here(
        _pack(x_PD, dropout), x_PD.shape[-1], self._mine(layout.size_E), layout.expected, dropout)
    return y_RD, jnp.ones(y_RD.shape[0], bool)


def _pack(x: Array, dropout: Dropout | None) -> Array:
  """Rows with their seeds as four more columns, so that both travel at once.

  A column holds one of a seed's bytes: whole numbers up to 255 are exact in bfloat16 too.
  """
  if dropout is None:
    return x
  byte = jnp.arange(0, 32, 8, dtype=jnp.uint32).reshape((1,) * dropout.seed.ndim + (4,))
  digits = (dropout.seed[..., None] >> byte) & jnp.uint32(255)
  return jnp.concatenate([x, digits.astype(x.dtype)], axis=-1)


def _all_to_all(a: Array) -> Array:
  """[n, ...]: part i goes to device i along `expert`; back come the parts of all devices."""
  with jax.named_scope("all_to_all"):
    return jax.lax.all_to_all(a, "expert", 0, 0, tiled=True)


def _sizes_of_all(size_E: Array) -> Array:
  """size_sE: the rows that each device along `expert` has for each expert."""
  with jax.named_scope("all_to_all"):
    return jax.lax.all_gather(size_E, "expert")


def _exchange_padded(size_sE: Array, R: int, N: int):
  """(there, back, size_e, served_R): from x_RD at the sources to N rows by expert here, and the way back.

  Every pair of devices exchanges as many rows, real or not.
  """
  n = size_sE.shape[0]
  place_N, sent_R, row_N, index_N, size_e = exchange.padded(size_sE, jax.lax.axis_index("expert"), R, N)
  swap = lambda a_ND: _all_to_all(a_ND.reshape(n, N // n, -1)).reshape(N, -1)
  there = lambda x_RD: rows.move(swap(rows.move(x_RD, place_N, sent_R[:, None])), index_N, row_N[:, None])
  back = lambda y_ND: rows.move(swap(rows.move(y_ND, row_N, index_N[:, None])), sent_R, place_N[:, None])
  return there, back, size_e, sent_R < N


def _exchange_ragged(size_sE: Array, R: int, N: int):
  """The same, and only real rows travel, each to its place."""
  out, home, size_e, served_R = exchange.ragged(size_sE, jax.lax.axis_index("expert"), R, N)
  there = lambda x_RD: _send(R, N, x_RD, out, home)
  back = lambda y_ND: _send(N, R, y_ND, home, out)
  return there, back, size_e, served_R


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(R: int, N: int, x_RD: Array, out: exchange.Runs, home: exchange.Runs) -> Array:
  """x_ND: the rows that come here by the runs `out`, zeros between them. Its gradient travels by `home`.

  The library's own gradient asks the others for offsets first, which are known here: two more exchanges.
  """
  del home
  with jax.named_scope("all_to_all"):
    empty_ND = partitioning.varying_like(jnp.zeros((N, x_RD.shape[1]), x_RD.dtype), x_RD, *out)
    return jax.lax.ragged_all_to_all(x_RD, empty_ND, *out, axis_name="expert")


def _send_forward(R, N, x_RD, out, home):
  return _send(R, N, x_RD, out, home), (out, home)


def _send_backward(R, N, runs, d_ND):
  out, home = runs
  return _send(N, R, d_ND, home, out), None, None


_send.defvjp(_send_forward, _send_backward)

# By platform; XLA has no ragged exchange for CPUs.
EXCHANGES = {"cpu": _exchange_padded}
