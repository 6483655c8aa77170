"""Expert cards of a layer: which tokens or patches each expert takes, and what of that is more than noise."""

import functools
import math
from typing import Any

import numpy as np

from sparse_experts.analysis import specialisation, token_text
from sparse_experts.analysis.profiles import Profile, assignments, profiles
from sparse_experts.analysis.trace import Columns
from sparse_experts.report.numbers import one
from sparse_experts.report.patches import as_data, patches
from sparse_experts.report.sample import Sample

MOST_TOKENS, MOST_EXAMPLES, MOST_CATEGORIES = 12, 4, 12  # of a card
TYPICAL = 10.83  # of `specialisation.typicality`: chance alone exceeds it in one of a thousand
number = functools.partial(one, digits=4)  # a card has no use for more


def layer_cards(name: str, traced: Columns, untrained: Columns, num_experts: int, sample: Sample,
                most: int) -> dict[str, Any]:
  """`expert_cards` of the `most` busiest experts in order of their numbers, and `information` per profile.

  traced: `trace`'s columns of the layer; untrained: the same through `analysis.untrained`. See
  docs/measures.md for the numbers.
  """
  traced, untrained = (assignments(columns) for columns in (traced, untrained))
  sorted_by = profiles(name, traced, *sample)
  found = specialisation.reliability(
      {p: (profile.category_N, len(profile.names)) for p, profile in sorted_by.items()}, traced["expert"],
      traced["example"], num_experts)
  before = {p: specialisation.halves(profile.category_N, len(profile.names), untrained["expert"], num_experts,
                                     untrained["example"])
            for p, profile in profiles(name, untrained, *sample).items()}
  control = {p: float(np.nanmean(r_E)) if np.isfinite(r_E).any() else math.nan
             for p, r_E in ((p, specialisation.split_half(count_HCE)) for p, count_HCE in before.items())}
  load_E = np.bincount(traced["expert"], minlength=num_experts)
  shown = np.sort(np.argsort(-load_E, kind="stable")[:most])
  tokens_E = typical_tokens(traced, num_experts, sample)
  rows_E = _profile_rows(sorted_by, traced, num_experts)
  cards = [{
      "expert": int(e), "share": number(load_E[e] / max(load_E.sum(), 1)), "assignments": int(load_E[e]),
      "tokens": tokens_E[e][0], "examples": _examples(name, traced, e, tokens_E[e][1], sample),
      "patches": [as_data(picture) for picture in patches(traced, e, sample)], "profiles": rows_E[e],
      "reliability": {p: {"split_half": number(of["split_half"][e]), "permuted": number(of["permuted"][e]),
                          "untrained": number(control[p])} for p, of in found.items()}}
      for e in shown]
  return {"expert_cards": cards, "information": {p: {
      "trained": number(of["information"]), "permuted": number(of["permuted_information"]),
      "untrained": number(specialisation.information(before[p].sum(0)))} for p, of in found.items()}}


def typical_tokens(traced: Columns, num_experts: int, sample: Sample) -> list[tuple[list[dict], list[int]]]:
  """Of each expert (rows of the tokens that it takes more often than by chance, the most typical first; their
  ids). Of pairs, shares and lifts are among the words."""
  text = traced["valid"] & (traced["token_id"] >= 0)
  ids, which_N = np.unique(traced["token_id"][text], return_inverse=True)
  count_TE = specialisation.counts(which_N, traced["expert"][text], len(ids), num_experts)
  typical_TE, size_T = specialisation.typicality(count_TE), count_TE.sum(1)
  overall_E = count_TE.sum(0) / max(count_TE.sum(), 1)
  found = []
  for e in range(num_experts):
    order = np.argsort(-typical_TE[:, e], kind="stable")[:MOST_TOKENS]
    best = [t for t in order if typical_TE[t, e] > TYPICAL]
    rows = [{"text": token_text.visible(sample.vocabulary.piece(int(ids[t]))), "count": int(count_TE[t, e]),
             "share": number(count_TE[t, e] / size_T[t]),
             "lift": number(count_TE[t, e] / size_T[t] / overall_E[e])} for t in best]
    found.append((rows, ids[best].tolist()))
  return found


def _profile_rows(sorted_by: dict[str, Profile], traced: Columns, num_experts: int) -> list[dict[str, list]]:
  """Of each expert {profile: rows}: the largest categories, positions in their order, else by size."""
  rows_E: list[dict[str, list]] = [{} for _ in range(num_experts)]
  for p, (names, category_N) in sorted_by.items():
    count_CE = specialisation.counts(category_N, traced["expert"], len(names), num_experts)
    size_C, load_E = count_CE.sum(1), count_CE.sum(0)
    largest = np.argsort(-size_C, kind="stable")
    shown = [c for c in largest if size_C[c]][:len(names) if p == "position" else MOST_CATEGORIES]
    for e in range(num_experts):
      rows_E[e][p] = [{"name": names[c], "share": number(count_CE[c, e] / load_E[e]),
                       "overall": number(size_C[c] / size_C.sum())}
                      for c in (sorted(shown) if p == "position" else shown)] if load_E[e] else []
  return rows_E


def _examples(layer: str, traced: Columns, expert: int, typical: list[int], sample: Sample) -> list[dict]:
  """Contexts: one of each of the most typical tokens, spread over the sample; without those, of any token."""
  mine = (traced["expert"] == expert) & (traced["token_id"] >= 0)
  id_BL, segment_BL, _ = sample.task.routed(layer, sample.batch)
  chosen = []
  for n in range(MOST_EXAMPLES):
    of = mine & (traced["token_id"] == typical[n]) if n < len(typical) else mine
    if (rows := np.flatnonzero(of)).size:
      chosen.append(rows[(2 * n + 1) * len(rows) // (2 * MOST_EXAMPLES)])
  place = [(traced["example"][row], traced["position"][row]) for row in chosen]
  return [token_text.context(sample.vocabulary, id_BL[b], segment_BL[b], int(l)) for b, l in place]
