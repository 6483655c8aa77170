"""Verdicts and power against values of t worked out by hand."""

import numpy as np
import pytest

from sparse_experts.ledger import verdict
from sparse_experts.ledger.verdict import Figure, judge

# Mean 0.14, deviation 0.0316228; t(0.975, 4) = 2.776445, t(0.95, 4) = 2.131847.
X = [0.10, 0.12, 0.14, 0.16, 0.18]


def test_the_intervals_by_hand():
  found = judge(X, 1, 0.05)
  half, half_90 = 2.776445 * 0.0316228 / 5**0.5, 2.131847 * 0.0316228 / 5**0.5
  assert (found.low, found.high) == pytest.approx((0.14 - half, 0.14 + half), abs=1e-6)
  assert (found.low_90, found.high_90) == pytest.approx((0.14 - half_90, 0.14 + half_90), abs=1e-6)
  assert (found.pairs, found.mean, found.deviation) == pytest.approx((5, 0.14, 0.0316228), abs=1e-7)


@pytest.mark.parametrize("differences, sign, delta, wanted", [
    (X, 1, 0.05, "shown"), (X, -1, 0.05, "opposite"), (X, 0, 0.05, "opposite"),
    (X, 1, 0.2, "no effect above delta"),  # it leaves out zero, and is of no interest
    (X, 0, 0.2, "shown"),
    ([-0.1, 0.2, -0.05, 0.1, 0.0], 1, 0.05, "underpowered"),
    ([-0.1, 0.2, -0.05, 0.1, 0.0], 0, 0.05, "underpowered"),
    ([-0.001, 0.002, 0.0, 0.001, -0.002], 1, 0.05, "no effect above delta")])
def test_verdicts(differences, sign, delta, wanted):
  assert judge(differences, sign, delta).verdict == wanted


def test_between_the_two_intervals():
  """90% within delta but 95% not: the test of equivalence is the 90% one."""
  half_90 = 2.131847 * 0.0316228 / 5**0.5
  assert judge(X, 1, 0.14 + half_90 + 1e-5).verdict == "no effect above delta"
  assert judge(X, 1, 0.14 + half_90 - 1e-5).verdict == "shown"


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, float("nan")]])
def test_what_cannot_be_judged(bad):
  with pytest.raises(ValueError, match="finite differences wanted"):
    judge(bad, 1, 0.1)


def test_power_by_simulation():
  """20,000 experiments of 10 pairs whose effect is one deviation; 0.803 in tables of the paired t-test."""
  x = np.random.default_rng(0).normal(1, 1, (20_000, 10))
  t = x.mean(1) / (x.std(1, ddof=1) / 10**0.5)
  found = verdict.power(10, 1.0, 1.0, 1)
  assert found == pytest.approx((abs(t) > 2.262157).mean(), abs=0.01)  # three standard errors are 0.0084
  assert found == pytest.approx(0.803, abs=5e-4)


def test_power_of_a_claim_of_no_effect_by_simulation():
  """20,000 experiments of 12 pairs without an effect: is the 90% interval within one deviation?"""
  x = np.random.default_rng(1).normal(0, 1, (20_000, 12))
  half = 1.795885 * x.std(1, ddof=1) / 12**0.5  # t(0.95, 11)
  inside = (abs(x.mean(1)) + half < 1.0).mean()
  assert verdict.power(12, 1.0, 1.0, 0) == pytest.approx(inside, abs=0.01)
  n = verdict.seeds_for(1.0, 1.0, 0)
  assert verdict.power(n - 1, 1.0, 1.0, 0) < 0.8 <= verdict.power(n, 1.0, 1.0, 0)


def test_the_seeds_that_would_do():
  """Half a deviation: 34 pairs, as in tables; as large as 4 deviations: 3; hopeless: at most MOST_SEEDS."""
  assert verdict.seeds_for(1.0, 0.5, 1) == 34
  assert verdict.seeds_for(1.0, 4.0, 1) == 3
  assert verdict.seeds_for(1.0, 1e-6, 1) == verdict.MOST_SEEDS
  assert verdict.power(33, 1.0, 0.5, 1) < 0.8 <= verdict.power(34, 1.0, 0.5, 1)
  assert verdict.seeds_for(0.0, 0.1, 1) == 2
  assert verdict.power(5, 1e-9, 1.0, 1) == 1.0  # scipy gives NaN


def test_published_numbers():
  figures = [Figure("a", 1.0, 1.1, 0.9, 1.3), Figure("b", 2.0, 2.5, 2.2, 2.8)]
  assert [figure.holds for figure in figures] == [True, False]
  assert verdict.judge_published(figures, 1) == "shown"
  assert verdict.judge_published(figures, 2) == "opposite"
