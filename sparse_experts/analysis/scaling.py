"""Scaling laws of routed language models: Clark et al.'s law, its fit to losses, and what follows from it.

Clark et al. 2022 (Unified Scaling Laws for Routed Language Models), sections 3 to 5. The law's logarithms
are base 10; losses are natural, in nats per token.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize


@dataclasses.dataclass(frozen=True)
class Law:
  """log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d, with Ê = `saturated(E)`.

  N: parameters that one token uses in the dense base network. E: experts.
  """

  a: float
  b: float
  c: float
  d: float
  e_start: float
  e_max: float

  def saturated(self, experts: ArrayLike) -> np.ndarray:
    """Ê: e_start at one expert, e_max at infinitely many."""
    start = 1 / (1 / self.e_start - 1 / self.e_max)
    return 1 / (1 / (np.asarray(experts, np.float64) - 1 + start) + 1 / self.e_max)

  def loss(self, params: ArrayLike, experts: ArrayLike) -> np.ndarray:
    """The predicted loss L(N, E), nats per token."""
    n, e = np.log10(np.asarray(params, np.float64)), np.log10(self.saturated(experts))
    return 10 ** (self.a * n + self.b * e + self.c * n * e + self.d)

  def effective_params(self, params: ArrayLike, experts: ArrayLike) -> np.ndarray:
    """Effective Parameter Count: N of the dense network (E = 1) with the same predicted loss."""
    n, e, start = np.log10(params), np.log10(self.saturated(experts)), np.log10(self.e_start)
    return 10 ** (((self.a + self.c * e) * n + self.b * (e - start)) / (self.a + self.c * start))

  def params(self, loss: ArrayLike, experts: ArrayLike) -> np.ndarray:
    """N with that loss at so many experts: a level curve of the law. It needs a + c log10 Ê < 0."""
    e = np.log10(self.saturated(experts))
    return 10 ** ((np.log10(loss) - self.d - self.b * e) / (self.a + self.c * e))

  @property
  def cutoff(self) -> float:
    """N above which more experts no longer lower the loss: 10^(-b / c). It needs c > 0."""
    return float(10 ** np.clip(-self.b / self.c, -300, 300)) if self.c else float("inf")


NAMES = tuple(field.name for field in dataclasses.fields(Law))


def fit(params: ArrayLike, experts: ArrayLike, losses: ArrayLike, start: Law | None = None) -> Law:
  """The law with the least sum of squared errors of log10 L.

  start: where the search begins; None: near the published laws. Raises ValueError for fewer than seven
  losses: the law has six numbers.
  """
  n, e = np.asarray(params, np.float64), np.asarray(experts, np.float64)
  y = np.log10(np.asarray(losses, np.float64))
  if len(y) <= len(NAMES):
    raise ValueError(f"{len(y)} losses cannot fix the law's {len(NAMES)} numbers; give more")
  guess = start or Law(-0.08, -0.1, 0.01, 1.1, 2.0, 300.0)
  # e_start and e_max - e_start stay positive as exponentials.
  first = [guess.a, guess.b, guess.c, guess.d, np.log(guess.e_start), np.log(guess.e_max - guess.e_start)]
  found = optimize.least_squares(lambda x: np.log10(_law(x).loss(n, e)) - y, first, x_scale="jac")
  return _law(found.x)


def _law(x: np.ndarray) -> Law:
  a, b, c, d, start, above = map(float, x)
  start = float(np.clip(start, -50, 50))
  above = float(np.clip(above, start - 30, 50))  # below this the sum would round to e_start itself
  return Law(a, b, c, d, float(np.exp(start)), float(np.exp(start) + np.exp(above)))


def bootstrap(params: ArrayLike, experts: ArrayLike, losses: ArrayLike, draws: int = 1000,
              seed: int = 0) -> list[Law]:
  """Laws fitted to `draws` sets of losses: the fitted law times residuals drawn with replacement.

  Residuals and not rows are drawn, since sizes and numbers of experts were set by design; they are scaled by
  sqrt(n / (n - 6)), what a fit of six numbers takes from them. Efron & Tibshirani 1993, section 9.4.
  """
  law, n = fit(params, experts, losses), len(np.asarray(losses))
  predicted = np.log10(law.loss(params, experts))
  residual = (np.log10(np.asarray(losses, np.float64)) - predicted) * np.sqrt(n / (n - len(NAMES)))
  residual -= residual.mean()
  rng = np.random.default_rng(seed)
  return [fit(params, experts, 10 ** (predicted + rng.choice(residual, n)), law) for _ in range(draws)]


def interval(laws: list[Law], figure: Callable[[Law], float], level: float = 0.95) -> tuple[float, float]:
  """The percentile interval of a figure over bootstrapped laws."""
  low, high = np.quantile([figure(law) for law in laws], [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def utilisation(params: ArrayLike, flops: ArrayLike, dense_params: ArrayLike,
                dense_flops: ArrayLike) -> np.ndarray:
  """B of the law's general form: parameters per FLOP, relative to the dense base network's.

  1 for the dense network itself, E for a model that is nothing but experts and uses one of them. With B as
  `experts` and FLOPs as `params`, `fit` covers other k and routing frequencies too. Clark et al. 2022,
  section 5; the division by the dense network's ratio is ours: it keeps B = 1 where nothing is routed.
  """
  ratio = lambda a, b: np.asarray(a, np.float64) / np.asarray(b, np.float64)
  return ratio(ratio(params, dense_params), ratio(flops, dense_flops))
