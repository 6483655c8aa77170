"""The contents of a sweep file: arms, seeds, and learning rates to try."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_experts.errors import UserError, nearest

RATE = "optimizer.learning_rate"


@dataclasses.dataclass(frozen=True)
class Arm:
  """A config FILE[:ARG], and overrides of its keys as in --config.KEY=VALUE."""

  config: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Arms x seeds to train and compare; `get_sweep()` of a sweep file returns it.

  baseline: the arm that others are compared with; None: the first one.
  learning_rates: each arm tries all of them on `tuning_seed` and trains its seeds with its best; if empty,
    an arm trains with the rate of its config.
  seeds_together: number of seeds of an arm trained as one program (`sweeps/seeds.py`); None: as many as fit,
    which is one on a CPU or a mesh.
  """

  arms: Mapping[str, Arm]
  seeds: Sequence[int] = range(5)
  baseline: str | None = None
  learning_rates: Sequence[float] = ()
  tuning_seed: int = 1000
  seeds_together: int | None = None

  def __post_init__(self):
    if not isinstance(self.arms, Mapping) or not self.arms:
      raise UserError("a sweep needs arms; write Sweep(arms={'name': Arm('configs/smoke.py')})")
    for name, arm in self.arms.items():
      if not isinstance(arm, Arm):
        raise UserError(f"arm '{name}' is of type {type(arm).__name__}; write Arm('configs/smoke.py')")
      if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"arm '{name}' becomes a folder's name; use letters, digits, and any of _ . + -")
    seeds = list(self.seeds)
    if not seeds or any(not isinstance(s, int) or s < 0 for s in seeds) or len(set(seeds)) < len(seeds):
      raise UserError(f"seeds={self.seeds!r}: give different whole numbers from 0 on, for example range(5)")
    if self.baseline is not None and self.baseline not in self.arms:
      raise UserError(f"baseline='{self.baseline}' is no arm{nearest(self.baseline, self.arms)}")
    if self.seeds_together is not None and self.seeds_together < 1:
      raise UserError(f"seeds_together={self.seeds_together} is out of range; choose 1 or more")
    rates = list(self.learning_rates)
    if any(not 0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
      raise UserError(f"learning_rates={self.learning_rates!r}: give different numbers above 0")
    if rates and self.tuning_seed in seeds:
      raise UserError(f"tuning_seed={self.tuning_seed} is one of the seeds that are reported; choose another")

  @property
  def base(self) -> str:
    return self.baseline or next(iter(self.arms))
