"""Expert cards of a layer: which tokens or patches each expert takes, and what of that is more than noise."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sparse_experts.analysis import specialisation, token_text
from sparse_experts.analysis.trace import Columns
from sparse_experts.models import Batch
from sparse_experts.tasks import Task

MOST_TOKENS, MOST_EXAMPLES, MOST_PATCHES, MOST_CATEGORIES = 12, 4, 8, 12  # of a card
TYPICAL = 10.83  # of `specialisation.typicality`: chance alone exceeds it in one of a thousand
EDGE = 48  # pixels of a drawn patch, about


class Sample(NamedTuple):
  """What the cards are of: records, what their ids and domains stand for, and the task."""

  batch: Batch
  task: Task
  vocabulary: Any  # of the task
  domains: Sequence[str]


class Profile(NamedTuple):
  """A way to sort assignments into categories."""

  names: list[str]
  category_N: np.ndarray


def layer_cards(name: str, traced: Columns, untrained: Columns, num_experts: int, sample: Sample,
                most: int) -> dict[str, Any]:
  """`expert_cards` of the `most` busiest experts in order of their numbers, and `information` per profile.

  traced: `trace`'s columns of the layer; untrained: the same through `analysis.untrained`. See
  docs/measures.md for the numbers.
  """
  traced, untrained = (_assignments(columns) for columns in (traced, untrained))
  profiles = _profiles(name, traced, sample)
  found = specialisation.reliability(
      {p: (profile.category_N, len(profile.names)) for p, profile in profiles.items()}, traced["expert"],
      traced["example"], num_experts)
  before = {p: specialisation.halves(profile.category_N, len(profile.names), untrained["expert"], num_experts,
                                     untrained["example"])
            for p, profile in _profiles(name, untrained, sample).items()}
  control = {p: float(np.nanmean(r_E)) if np.isfinite(r_E).any() else math.nan
             for p, r_E in ((p, specialisation.split_half(count_HCE)) for p, count_HCE in before.items())}
  load_E = np.bincount(traced["expert"], minlength=num_experts)
  shown = np.sort(np.argsort(-load_E, kind="stable")[:most])
  tokens_E, rows_E = typical_tokens(traced, num_experts, sample), _profile_rows(profiles, traced, num_experts)
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


def patches(traced: Columns, expert: int, sample: Sample, most: int = MOST_PATCHES) -> list[np.ndarray]:
  """Pictures of the patches that the expert takes with the largest gates, one of an image; none of text."""
  rows = np.flatnonzero((traced["expert"] == expert) & (traced["token_id"] < 0) & traced["valid"])
  rows = np.random.default_rng(0).permutation(rows)  # equal gates in no order
  found: dict[int, np.ndarray] = {}
  for row in rows[np.argsort(-traced["gate"][rows], kind="stable")]:
    example = int(traced["example"][row])
    if len(found) == most:
      break
    if example not in found:
      record = {field: a[example] for field, a in sample.batch.items()}
      picture = sample.task.patch(record, int(traced["position"][row]))
      if picture is not None:
        found[example] = picture
  return list(found.values())


def draw_patches(layers: dict[str, Columns], num_experts: dict[str, int], sample: Sample, path: str,
                 most: int = 16) -> bool:
  """A PNG with a panel per layer, a row of `patches` per expert of the first `most`; False without any.

  A picture shows the patch and, dimmed, those around it.
  """
  from matplotlib.figure import Figure  # not pyplot, which would choose a window system

  panels = {}
  for layer, traced in layers.items():
    experts = [patches(traced, e, sample) for e in range(min(num_experts[layer], most))]
    if any(experts):
      panels[layer] = experts
  if not panels:
    return False
  edge = max(len(picture) for experts in panels.values() for row in experts for picture in row)
  cell = edge + max(edge // 8, 1)  # with a gap
  rows = max(map(len, panels.values()))
  figure = Figure(figsize=(1 + 3.6 * len(panels), 0.6 + 0.42 * rows), layout="constrained")
  for panel, (layer, experts) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
    grid = np.full((cell * len(experts), cell * MOST_PATCHES, 3), 255, np.uint8)
    for e, row in enumerate(experts):
      for i, picture in enumerate(row):
        grid[cell * e:cell * e + edge, cell * i:cell * i + edge] = picture
    panel.imshow(grid, interpolation="nearest")
    left = num_experts[layer] - len(experts)
    panel.set_title(layer + (f", {left} more not shown" if left else ""), fontsize=9)
    panel.set_yticks([cell * e + edge / 2 for e in range(len(experts))], range(len(experts)), fontsize=8)
    panel.set_xticks([])
    panel.set_ylabel("expert")
  figure.savefig(path, dpi=130)
  return True


def as_data(picture_HWC: np.ndarray) -> str:
  """A picture as the address of a PNG of few colours, enlarged without smoothing if it is small."""
  image, times = Image.fromarray(picture_HWC), max(EDGE // len(picture_HWC), 1)
  size = (image.width * times, image.height * times)
  if max(size) > 1.5 * EDGE:
    size = (EDGE, EDGE)
  image = image.resize(size, Image.Resampling.NEAREST if times > 1 else Image.Resampling.BOX)
  out = io.BytesIO()
  image.quantize(32).save(out, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def number(x: float, digits: int = 4) -> float | None:
  """Four digits, as JSON has no more use for; None of what is not finite."""
  return float(f"{x:.{digits}g}") if math.isfinite(x) else None


def _assignments(traced: Columns) -> Columns:
  return {column: a[traced["valid"]] for column, a in traced.items()}


def _profiles(layer: str, traced: Columns, sample: Sample) -> dict[str, Profile]:
  """By domain, class or modality, by position and, of text, by class of the token."""
  task = sample.task
  found = {task.grouping: Profile(list(sample.domains), traced["domain"])}
  length = task.routed(layer, sample.batch).id_BL.shape[1]
  found["position"] = _named(task.places(layer, length), traced["position"])
  if task.token_targets:
    ids, which_N = np.unique(traced["token_id"], return_inverse=True)
    found["token class"] = _named([token_text.token_class(sample.vocabulary, int(i)) for i in ids], which_N)
  return found


def _named(name_I: list[str], which_N: np.ndarray) -> Profile:
  """Categories by the names of what is numbered; equal names are one category."""
  names = list(dict.fromkeys(name_I))
  return Profile(names, np.array([names.index(name) for name in name_I], np.int64)[which_N])


def _profile_rows(profiles: dict[str, Profile], traced: Columns, num_experts: int) -> list[dict[str, list]]:
  """Of each expert {profile: rows}: the largest categories, positions in their order, else by size."""
  rows_E: list[dict[str, list]] = [{} for _ in range(num_experts)]
  for p, (names, category_N) in profiles.items():
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
