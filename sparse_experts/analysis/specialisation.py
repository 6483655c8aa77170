"""What experts specialise in: their tokens and categories, and how far that is more than noise.

Counts of assignments, from the columns of `trace`; choices that a router skipped are not counted. Letters:
C categories (token ids, domains, positions, ...), E experts, N assignments.
"""

import math
from typing import Any

import numpy as np
from scipy import special, stats

PERMUTATIONS = 100


def counts(category_N: np.ndarray, expert_N: np.ndarray, num_categories: int, num_experts: int) -> np.ndarray:
  """Assignments by category and expert, int64 _CE."""
  flat_N = category_N.astype(np.int64) * num_experts + expert_N
  return np.bincount(flat_N, minlength=num_categories * num_experts).reshape(num_categories, num_experts)


def lifts(count_CE: np.ndarray) -> np.ndarray:
  """The share of a category among an expert's assignments over its share among all, _CE; 1 where it is as
  frequent as everywhere, NaN of a category or an expert without assignments."""
  total, size_C1, load_1E = count_CE.sum(), count_CE.sum(1, keepdims=True), count_CE.sum(0, keepdims=True)
  with np.errstate(invalid="ignore", divide="ignore"):
    return count_CE * total / (size_C1 * load_1E)


def typicality(count_CE: np.ndarray) -> np.ndarray:
  """Signed log-likelihood ratio, _CE: above 0 where category and expert meet more often than by chance.

  G2 = 2 sum O ln(O / E) over the 2 x 2 table (this category or not, this expert or not), with O observed and
  E expected counts (Dunning 1993). Unlike a lift it does not favour rare categories, nor frequent ones as
  counts do. Chance alone exceeds 10.8 in one of a thousand.
  """
  total = count_CE.sum(dtype=np.float64)
  size_C1, load_1E = count_CE.sum(1, keepdims=True), count_CE.sum(0, keepdims=True)
  expected_CE = size_C1 * load_1E / max(total, 1.0)
  cells = [(count_CE, expected_CE), (size_C1 - count_CE, size_C1 - expected_CE),
           (load_1E - count_CE, load_1E - expected_CE),
           (total - size_C1 - load_1E + count_CE, total - size_C1 - load_1E + expected_CE)]
  with np.errstate(invalid="ignore", divide="ignore"):
    g2_CE = 2 * sum(np.where(seen > 0, seen * np.log(seen / wanted), 0.0) for seen, wanted in cells)
  return np.where(count_CE >= expected_CE, 1, -1) * np.maximum(g2_CE, 0.0)


def information(count_CE: np.ndarray) -> float:
  """Nats that the category tells about the expert: their mutual information. 0 for independent ones, the
  entropy of the load at most; counts of few assignments overstate it."""
  p_CE = count_CE / max(count_CE.sum(), 1)
  independent_CE = p_CE.sum(1, keepdims=True) * p_CE.sum(0, keepdims=True)
  seen = p_CE > 0
  return max(round(float((p_CE[seen] * np.log(p_CE[seen] / independent_CE[seen])).sum()), 12), 0.0)


def normalised_information(count_CE: np.ndarray) -> float:
  """`information` over the geometric mean of the entropies of category and expert (Strehl & Ghosh 2002).

  0 if they are independent, 1 if each says what the other is; NaN if all assignments have one category or one
  expert, so that there is nothing to tell.
  """
  entropies = [-float(special.xlogy(p, p).sum()) for p in (
      count_CE.sum(axis) / max(count_CE.sum(), 1) for axis in (0, 1))]
  return information(count_CE) / math.sqrt(math.prod(entropies)) if min(entropies) > 1e-12 else math.nan


def specialisation(category_N: np.ndarray, num_categories: int, expert_N: np.ndarray, num_experts: int,
                   example_N: np.ndarray, permutations: int = PERMUTATIONS) -> dict[str, float]:
  """How far a category tells the expert, beyond what the number of counts alone gives.

    normalised   `normalised_information`
    permuted     its mean over permutations, in which the category tells nothing
    above        normalised - permuted: near 0, or below, without specialisation

  Experts are permuted among all assignments. Where all assignments of a record have one category (its domain,
  the class of an image), records exchange their categories instead: what else tokens of a record have in
  common would else count as the domain's. All three are NaN where `normalised_information` is.
  """
  rng, count_CE = np.random.default_rng(0), counts(category_N, expert_N, num_categories, num_experts)
  normalised = normalised_information(count_CE)
  if math.isnan(normalised):
    return dict.fromkeys(("normalised", "permuted", "above"), math.nan)
  examples, which_N = np.unique(example_N, return_inverse=True)
  category_X = np.zeros(len(examples), np.int64)
  category_X[which_N] = category_N
  if len(examples) > 1 and (category_X[which_N] == category_N).all():
    count_XE = counts(which_N, expert_N, len(examples), num_experts)
    tables = [_add_rows(count_XE, rng.permutation(category_X), num_categories) for _ in range(permutations)]
  else:
    # Tables with the same sums of rows and columns, as likely as permutations make them.
    sums = [total[total > 0] for total in (count_CE.sum(1), count_CE.sum(0))]
    tables = list(stats.random_table(*sums, seed=rng).rvs(permutations))
  permuted = float(np.mean([normalised_information(table_CE) for table_CE in tables]))
  return {"normalised": normalised, "permuted": permuted, "above": normalised - permuted}


def _add_rows(count_XE: np.ndarray, category_X: np.ndarray, num_categories: int) -> np.ndarray:
  """The rows of each category added up, _CE."""
  count_CE = np.zeros((num_categories, count_XE.shape[1]), count_XE.dtype)
  np.add.at(count_CE, category_X, count_XE)
  return count_CE


def halves(category_N: np.ndarray, num_categories: int, expert_N: np.ndarray, num_experts: int,
           example_N: np.ndarray) -> np.ndarray:
  """`counts` in the records of even and in those of odd number, int64 _HCE."""
  half_N = example_N.astype(np.int64) % 2
  count = counts(half_N * num_categories + category_N, expert_N, 2 * num_categories, num_experts)
  return count.reshape(2, num_categories, num_experts)


def split_half(count_HCE: np.ndarray) -> np.ndarray:
  """The correlation of each expert's profile in one half of the records with that in the other, _E.

  A profile is the expert's `lifts`, by the shares of its own half. The correlation is Pearson's over the
  categories that both halves have, weighted by the mean of their shares in the halves: so rare categories,
  whose lifts are noise, weigh little. No Spearman-Brown correction: it is the reliability of half the
  sample. NaN below three such categories (two always correlate by 1 or -1), and for an expert that has no
  assignment in a half or takes all categories alike.
  """
  both_C = (count_HCE.sum(2) > 0).all(0)
  if both_C.sum() < 3:
    return np.full(count_HCE.shape[2], np.nan)
  count_HCE = count_HCE[:, both_C]
  size_HC = count_HCE.sum(2)
  weight_C1 = (size_HC / size_HC.sum(1, keepdims=True)).mean(0)[:, None]
  a_CE, b_CE = map(lifts, count_HCE)
  a_CE, b_CE = (x_CE - (weight_C1 * x_CE).sum(0) for x_CE in (a_CE, b_CE))
  covariance = lambda x_CE, y_CE: (weight_C1 * x_CE * y_CE).sum(0)
  spread_E = np.sqrt(covariance(a_CE, a_CE) * covariance(b_CE, b_CE))
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.where(spread_E > 1e-12, covariance(a_CE, b_CE) / spread_E, np.nan)


def reliability(profiles: dict[str, tuple[np.ndarray, int]], expert_N: np.ndarray, example_N: np.ndarray,
                num_experts: int, permutations: int = PERMUTATIONS) -> dict[str, dict[str, Any]]:
  """{profile: {...}} of the assignments of one layer. profiles: {name: (category_N, number of categories)}.

    split_half    _E, see `split_half`, between `halves`
    permuted      _E, the noise floor: 95 of 100 permutations of the experts among all assignments of the
                  layer, which keep loads and categories, give a smaller correlation
    information   nats, see `information`
    permuted_information   its mean over the permutations: what the number of counts alone gives
  """
  rng = np.random.default_rng(0)

  def of(expert_N):
    count = {name: halves(category_N, C, expert_N, num_experts, example_N)
             for name, (category_N, C) in profiles.items()}
    return {name: (split_half(a_HCE), information(a_HCE.sum(0))) for name, a_HCE in count.items()}

  found, permuted = of(expert_N), [of(rng.permutation(expert_N)) for _ in range(permutations)]
  return {name: {"split_half": correlation_E,
                 "permuted": _quantile(np.stack([each[name][0] for each in permuted]), 0.95),
                 "information": nats,
                 "permuted_information": float(np.mean([each[name][1] for each in permuted]))}
          for name, (correlation_E, nats) in found.items()}


def _quantile(x_PE: np.ndarray, q: float) -> np.ndarray:
  """Over P, NaN left out; NaN where there is nothing else."""
  some_E, found_E = np.isfinite(x_PE).any(0), np.full(x_PE.shape[1], np.nan)
  found_E[some_E] = np.nanquantile(x_PE[:, some_E], q, axis=0)
  return found_E
