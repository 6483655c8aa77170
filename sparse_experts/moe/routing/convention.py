"""What a router's paper sets around the router: slots of the experts, and how losses add up over layers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Convention:
  """What acts where a config's keys of these names are unset.

  capacity_factor: in training; eval_capacity_factor: in evaluation; 0: dropless, the default.
  capacity_rule: a key of CAPACITY_RULES; also of a factor that a config sets alone.
  min_capacity: fewest slots; None: the rule's.
  layer_losses: a coefficient is of each layer's loss (`sum`), or of the mean over the sparse layers (`mean`).
  words: instead of the factors in tables, for routers whose slots follow from something else.
  """

  capacity_factor: float = 0.0
  eval_capacity_factor: float = 0.0
  capacity_rule: str = "megablocks"  # counts k: a factor of 1 holds an even load
  min_capacity: int | None = None
  layer_losses: str = "sum"
  words: str = ""

  @property
  def capacity(self) -> str:
    """The capacity in words."""
    if self.words or not self.capacity_factor:
      return self.words or "dropless"
    other = self.eval_capacity_factor != self.capacity_factor
    return f"{self.capacity_factor}{f', evaluation {self.eval_capacity_factor}' if other else ''}" + (
        f" ({self.capacity_rule})")
