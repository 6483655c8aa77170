"""What independently trained, paired seeds say of a claim: a verdict, and the power to reach one."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from sparse_experts.analysis.compare import spread

SHOWN, OPPOSITE, NONE = "shown", "opposite", "no effect above delta"
UNDERPOWERED, OUT_OF_REACH = "underpowered", "out of reach"
POWER = 0.8
MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Finding:
  """The paired differences of a claim, and what they say.

  low, high: the mean's 95% t-interval. low_90, high_90: the interval of the equivalence test. seeds_needed:
  pairs with which the claim has a power of 80%, given this deviation.
  """

  verdict: str
  pairs: int
  mean: float
  deviation: float
  low: float
  high: float
  low_90: float
  high_90: float
  seeds_needed: int


def judge(differences: Sequence[float], sign: int, delta: float) -> Finding:
  """The verdict on paired differences, tested arm minus baseline, one per seed.

  sign: of the difference that the claim states; 0: it states that there is none. delta: the smallest effect
  of interest, above 0.

  *no effect above delta*: the 90% interval lies within -delta and delta (two one-sided tests, Schuirmann
  1987), even where it leaves out zero: such an effect is of no interest. Otherwise *shown* or *opposite*: the
  95% interval leaves out zero. Otherwise *underpowered*. A claim of no effect is *shown* by the first and
  *opposite* by the second. Raises ValueError for fewer than two differences, or any that is not finite.
  """
  x = np.asarray(differences, np.float64)
  if len(x) < 2 or not np.isfinite(x).all():
    raise ValueError(f"{len(x)} finite differences wanted, at least 2; got {list(differences)}")
  of, of_90 = spread(x), spread(x, 0.9)
  assert of.mean is not None and of.deviation is not None and of.interval and of_90.interval  # two at least
  (low, high), (low_90, high_90) = of.interval, of_90.interval
  direction = 1 if low > 0 else -1 if high < 0 else 0
  if -delta < low_90 and high_90 < delta:
    verdict = NONE if sign else SHOWN
  elif direction:
    verdict = SHOWN if direction == sign else OPPOSITE
  else:
    verdict = UNDERPOWERED
  return Finding(verdict, of.n, of.mean, of.deviation, low, high, low_90, high_90,
                 seeds_for(of.deviation, delta, sign))


def power(pairs: int, deviation: float, delta: float, sign: int) -> float:
  """Chance that the two-sided 95% paired t-test finds a true effect of delta.

  With sign 0: that the two one-sided tests find an effect of zero to lie within delta.
  """
  if deviation == 0:
    return 1.0
  if not sign:
    return _equivalence_power(pairs, deviation, delta)
  t = special.stdtrit(pairs - 1, 0.975)
  shift = delta / deviation * math.sqrt(pairs)
  # scipy finds some chances that are closer to 0 or 1 than any rounding to be NaN.
  return float(np.nan_to_num(stats.nct.sf(t, pairs - 1, shift), nan=1.0)
               + np.nan_to_num(stats.nct.cdf(-t, pairs - 1, shift)))


def _equivalence_power(pairs: int, deviation: float, delta: float) -> float:
  """P(|mean| + t s / sqrt(n) < delta) for a mean around 0, over the distribution of s."""
  quantile = (np.arange(1000) + 0.5) / 1000
  s = deviation * np.sqrt(special.chdtri(pairs - 1, 1 - quantile) / (pairs - 1))
  room = np.maximum(delta - special.stdtrit(pairs - 1, 0.95) * s / math.sqrt(pairs), 0.0)
  return float((2 * special.ndtr(room * math.sqrt(pairs) / deviation) - 1).mean())


def seeds_for(deviation: float, delta: float, sign: int, wanted: float = POWER) -> int:
  """The fewest pairs with that power, at most MOST_SEEDS."""
  low, high = 2, MOST_SEEDS
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if power(middle, deviation, delta, sign) >= wanted else (middle + 1, high)
  return low


def judge_published(figures: Sequence["Figure"], at_least: int) -> str:
  """*shown* where at least so many published numbers lie within our 95% intervals, otherwise *opposite*."""
  return SHOWN if sum(figure.holds for figure in figures) >= at_least else OPPOSITE


@dataclasses.dataclass(frozen=True)
class Figure:
  """A published number beside ours, with the 95% interval of ours."""

  name: str
  published: float
  ours: float
  low: float
  high: float

  @property
  def holds(self) -> bool:
    return self.low <= self.published <= self.high
