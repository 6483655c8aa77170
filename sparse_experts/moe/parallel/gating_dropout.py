"""Gating Dropout: in random training steps all tokens stay on their machine, and nothing is exchanged."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.arguments import check, check_divides
from sparse_experts.moe.routing import Routing, by_token
from sparse_experts.partitioning import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class GatingDropout:
  """With probability `rate`, one draw for all devices, tokens skip the gate (Liu et al. 2022).

  They then go to the experts of the machine they are on (Gate-Drop), or to none (`skip_experts`, Gate-Expert-
  Drop). The config says which machine that is, not the mesh, so results are the same on any mesh: the experts
  are divided over `machines` in order, and so are the groups of each of `replicas` equal parts of the batch.
  On a mesh with data = replicas, whose `expert` axis divides `machines`, such a step makes no all-to-all.

  The paper leaves these open: here the draw is made per step and layer; of several experts on a machine a
  token takes number e mod them, e its first choice; the output is multiplied by the sum of the token's gates,
  without gradient, so that later layers see outputs of their usual size. Losses and metrics are the router's.
  """

  rate: float
  machines: int = 1
  replicas: int = 1
  skip_experts: bool = False

  def check(self, num_experts: int) -> None:
    """Raises UserError if it cannot work with that many experts."""
    check(0 <= self.rate <= 1, "gating_dropout.rate", self.rate, "is no probability; choose 0 to 1")
    check_divides("gating_dropout.machines", self.machines, num_experts)
    check(self.replicas >= 1, "gating_dropout.replicas", self.replicas, "is out of range; choose 1 or more")

  def plan(self, routing: Routing, num_experts: int, key: Array | None,
           mesh: Mapping[str, int]) -> tuple[Routing, Array | None]:
    """(the list to dispatch, keep_local).

    `keep_local`, a bool scalar, is True in a call whose list names only experts held by the token's own
    device; such a call exchanges nothing. None: the list may name any expert.
    key: None outside training. mesh: the current mesh's axes that are larger than 1.
    """
    if key is None:
      return routing, None
    keep_local = self.draw(key)
    routing = self.local_list(keep_local, routing, num_experts)
    return routing, keep_local if self._fits(mesh, routing.token.shape[0]) else None

  def draw(self, key: Array) -> Array:
    """Whether tokens stay on their machine in this step, a bool scalar."""
    return jax.random.bernoulli(key, self.rate)

  def local_list(self, keep_local: Array, routing: Routing, num_experts: int) -> Routing:
    """The list itself where `keep_local` is False; else each token goes to an expert of its machine."""
    G = routing.token.shape[0]
    K, e = routing.rows_per_token, num_experts // self.machines
    if K is None:
      raise UserError("gating_dropout needs a router that lists every token equally often, as token choice"
                      " does; set model.gating_dropout.rate=0 or choose another router")
    group_G1 = jnp.arange(G, dtype=jnp.int32)[:, None]
    machine_G1 = group_G1 * self.replicas * self.machines // G % self.machines
    used_GA = jax.lax.stop_gradient(jnp.where(routing.valid, routing.gate, 0.0))
    total_GT = by_token(routing, K)(used_GA).sum(-1)
    first_GA = routing.ranks() == 0
    valid_GA = routing.valid & first_GA & (not self.skip_experts)
    pick = lambda local, routed: jnp.where(keep_local, local, routed)
    return routing.replace(
        expert=pick(machine_G1 * e + routing.expert % e, routing.expert),
        gate=pick(jnp.take_along_axis(total_GT, routing.token, axis=-1), routing.gate),
        valid=pick(valid_GA, routing.valid))

  def _fits(self, mesh: Mapping[str, int], G: int) -> bool:
    """Whether each device holds whole machines with their groups: then local steps need no exchange."""
    shards = math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)
    return bool(mesh) and G % shards == 0 and (
        mesh.get("data", 1) == self.replicas and self.machines % mesh.get("expert", 1) == 0)
