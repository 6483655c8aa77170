"""How the sparse layers of one stack route, and the layers made from that."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
from flax import nnx

from sparse_experts.config import FACTOR_KEYS, ConfigDict, sparse_indices
from sparse_experts.errors import UserError
from sparse_experts.models.blocks import SharedExperts
from sparse_experts.models.stack import Stack
from sparse_experts.models.template import fold
from sparse_experts.moe import (
    LAYERS,
    Convention,
    GatingDropout,
    Heads,
    MoELayer,
    MultiHeadLayer,
    Router,
    Routing,
    make_layer,
    make_router,
)
from sparse_experts.moe.dispatch import dropless_dispatch
from sparse_experts.moe.registry import router_k

PHASES = ("train", "eval_capacity", "dropless")


@dataclasses.dataclass(frozen=True)
class SparseSpec:
  """The routing fields of `config.model` for one stack, the phase, and what replaces the config's router.

  num_experts: 0 for the dense twin, whose FFNs are as wide as all experts that work on a token.
  router: the name, and the arguments that are set.
  instance: a router that every layer starts from, instead of `router`.
  edit: changes every routing before the dispatch (see `moe/edits.py`).
  """

  num_experts: int
  moe_every: int
  moe_layers: tuple[int, ...]
  router: dict[str, Any]
  dispatch: str
  group_size: int
  capacity_factor: float | None  # of these four None: the router's own convention
  eval_capacity_factor: float | None
  capacity_rule: str | None
  min_capacity: int | None
  capacity_slots: int | None  # instead of them
  phase: str
  section: str = "model.router"  # of the config, where `router` is set
  instance: Router | None = None
  edit: Callable[..., Routing] | None = None

  @classmethod
  def from_config(cls, m: ConfigDict, phase: str, instance: Router | None = None,
                  edit: Callable[..., Routing] | None = None) -> "SparseSpec":
    fields = {name: m[name] for name in m.decoder if name != "router"}
    return cls(**fields, router=_set(m.router), phase=phase, instance=instance, edit=edit)

  def override(self, section: ConfigDict) -> "SparseSpec":
    """This spec with the fields that `section`, `config.model.decoder`, sets."""
    given = _set(section.router)
    same = given.get("name", self.router["name"]) == self.router["name"]  # another takes other arguments
    fields = {name: value for name, value in _set(section).items() if name != "router"}
    if "capacity_slots" in fields:
      fields |= dict.fromkeys(FACTOR_KEYS)
    elif not fields.keys().isdisjoint(FACTOR_KEYS):
      fields["capacity_slots"] = None
    return dataclasses.replace(self, **fields, router=(self.router if same else {}) | given,
                               section="model.decoder.router")

  def layers(self, num_layers: int) -> tuple[int, ...]:
    """The layers of a stack that are sparse, or, without experts, as wide as those."""
    return sparse_indices(num_layers, self.moe_every, self.moe_layers)

  @property
  def k(self) -> int:
    """Experts that work on a token, by the router's own default if the config sets none."""
    if self.instance is not None:
      return self.instance.k
    return 1 if self.router["name"] in LAYERS else router_k(**self.router)

  def capacity(self, own: Convention) -> dict[str, Any]:
    """Arguments of `MoELayer`, the dispatch among them, for a router whose own convention is given."""
    if self.phase == "dropless":
      return {"dispatch": dropless_dispatch(self.dispatch)}
    if self.capacity_slots is not None:
      return {"dispatch": self.dispatch, "capacity_slots": self.capacity_slots}
    name = "capacity_factor" if self.phase == "train" else "eval_capacity_factor"
    either = lambda name: getattr(own if getattr(self, name) is None else self, name)
    factor, is_set = either(name), getattr(self, name) is not None
    # Dropless, `einsum` and `scatter` have a slot for every token: E / k times the work for the same result.
    dispatch = self.dispatch if factor or is_set else dropless_dispatch(self.dispatch)
    return {"dispatch": dispatch, "capacity_factor": factor or None,
            "capacity_rule": either("capacity_rule"), "min_capacity": either("min_capacity")}

  def make_router(self, d: int, *, rngs: nnx.Rngs) -> Router:
    if self.instance is not None:
      return self.instance
    return make_router(d=d, num_experts=self.num_experts, rngs=rngs, section=self.section, **self.router)


def _set(section: ConfigDict) -> dict[str, Any]:
  return {name: value for name, value in section.items() if value is not None}


def make_sparse(m: ConfigDict, spec: SparseSpec, experts: Any, shared: SharedExperts | None = None,
                heads: Heads | None = None, *, key: jax.Array) -> MoELayer:
  """A layer that routes as `spec` says, or one that mixes the experts, if that is what its router names."""
  rngs, name = nnx.Rngs(params=fold(key, "router")), spec.router["name"]
  if spec.instance is None and name in LAYERS:
    if spec.edit is not None:
      raise UserError(f"{spec.section}.name='{name}' makes no routing that could be edited; choose a router")
    mixture = make_layer(d=m.embed_dim, experts=experts, rngs=rngs, section=spec.section, **spec.router)
    return cast(MoELayer, mixture)  # which has the same interface
  router = spec.make_router(m.embed_dim if heads is None else heads.width, rngs=rngs)
  make = MoELayer if heads is None else functools.partial(MultiHeadLayer, heads)
  return make(
      router, experts, group_size=spec.group_size, **spec.capacity(router.convention(router.k)),
      exchange_rows_factor=m.exchange_rows_factor, edit=spec.edit, shared=shared,
      exchange=GatingDropout(**m.gating_dropout) if m.gating_dropout.rate else None)


def refuse_future(spec: SparseSpec, stack: Stack) -> None:
  """Raises UserError if a sparse layer of a causal stack sees later tokens."""
  for layer, sparse in stack.sparse_layers.items():
    if sparse.routing_causality in ("sequence", "batch"):
      order = spec.router.get("order", "choice")
      order = "" if order == "choice" else f" with order='{order}'"
      raise UserError(
          f"{spec.section}.name='{spec.router['name']}'{order} sees other tokens, later ones too (causality"
          f" '{sparse.routing_causality}'), so the causal layer {layer} cannot use it; choose"
          f" {spec.section}.name='top_k' and order='choice' or 'token'")
