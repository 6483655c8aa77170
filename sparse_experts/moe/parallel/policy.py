"""Exchange policies: when tokens travel to experts on other devices."""

import dataclasses
from collections.abc import Mapping

from jax import Array

from sparse_experts.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class ExchangePolicy:
  """Tokens travel in every call: the default, and the interface of other policies."""

  def check(self, num_experts: int) -> None:
    """Raises UserError if the policy cannot work with that many experts."""

  def plan(self, routing: Routing, num_experts: int, key: Array | None,
           mesh: Mapping[str, int]) -> tuple[Routing, Array | None]:
    """(the list to dispatch, keep_local).

    `keep_local`, a bool scalar, is True in a call whose list names only experts held by the token's own
    device; such a call exchanges nothing. None: the list may name any expert.
    key: None outside training. mesh: the current mesh's axes that are larger than 1.
    """
    return routing, None
