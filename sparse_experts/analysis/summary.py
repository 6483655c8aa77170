"""Summary of a trace: a line per layer, and which domain goes to which experts."""

from collections.abc import Sequence

import numpy as np

Columns = dict[str, np.ndarray]

COLUMNS = ("step", "layer", "tokens", "load max/mean", "entropy", "dropped", "saturation", "domain",
           "its expert", "share", "of all")
_MIN_SHARE = 0.01  # of the assignments: the favourite expert of a smaller domain may be chance


def rows(traced: Columns, num_experts: dict[str, int], domains: Sequence[str]) -> list[tuple]:
  """COLUMNS of each step and layer.

  load max/mean: the busiest expert's assignments, before drops, over the mean. entropy: of the router's
  probabilities per token, nats. saturation: see `saturation`. domain: the one with the strongest
  preference, its expert, the share of the domain's assignments that it takes, and its share of all.
  """
  table, settled = [], saturation(traced)
  for step in np.unique(traced["step"]):
    for layer, experts in num_experts.items():
      here = rows_of(traced, step, layer)
      count_DE, first, valid = domain_loads(here, len(domains), experts), here["rank"] == 0, here["valid"]
      load_E, (d, e, share) = count_DE.sum(0), _favourite(count_DE)
      dropped = (valid & ~here["kept"]).sum() / max(valid.sum(), 1)
      entropy = here["entropy"][first].mean(dtype=np.float64)
      tokens = (first & (here["head"] == 0)).sum()
      table.append((int(step), layer, f"{tokens:,}", f"{load_E.max() / load_E.mean():.2f}",
                    f"{entropy:.2f}", f"{dropped:.1%}", f"{settled[int(step), layer]:.0%}", domains[d], e,
                    f"{share:.0%}", f"{load_E[e] / load_E.sum():.0%}"))
  return table


def assignments(traced: Columns) -> str:
  """How many assignments the trace holds, and how many rows are none because the router skipped them."""
  valid = int(traced["valid"].sum())
  skipped = len(traced["valid"]) - valid
  return f"{valid:,} assignments" + (f" and {skipped:,} skipped choices" if skipped else "")


def saturation(traced: Columns) -> dict[tuple[int, str], float]:
  """{(step, layer): share of a token's experts at the last step that it had at this one}, over tokens,
  of a layer that cuts them over sub-tokens.

  Muennighoff et al. 2024 (OLMoE): |experts(step) ∩ experts(last)| / |experts(last)|, on the same records.
  Tokens without an expert at the last step are left out.
  """
  shares, last = {}, traced["step"].max()
  for layer in np.unique(traced["layer"]):
    of_layer = (traced["layer"] == layer) & traced["valid"]
    example, position, head, expert, step = (traced[name][of_layer].astype(np.int64) for name in (
        "example", "position", "head", "expert", "step"))
    token = (example * (position.max(initial=0) + 1) + position) * (head.max(initial=0) + 1) + head
    pair, end = token * (expert.max(initial=0) + 1) + expert, step == last
    number = np.bincount(token[end])
    for s in np.unique(traced["step"]):
      still = np.isin(pair[end], pair[step == s])
      shares[int(s), str(layer)] = float(
          (np.bincount(token[end], still)[number > 0] / number[number > 0]).mean())
  return shares


def domain_loads(traced: Columns, num_domains: int, num_experts: int) -> np.ndarray:
  """Valid assignments by domain and expert, int64 _DE."""
  valid = traced["valid"]
  flat = traced["domain"][valid].astype(np.int64) * num_experts + traced["expert"][valid]
  return np.bincount(flat, minlength=num_domains * num_experts).reshape(num_domains, num_experts)


def rows_of(traced: Columns, step: int, layer: str) -> Columns:
  """The rows of one step and layer."""
  here = (traced["step"] == step) & (traced["layer"] == layer)
  return {name: a[here] for name, a in traced.items()}


def _favourite(count_DE: np.ndarray) -> tuple[int, int, float]:
  """(domain, expert, share) where a domain's share most exceeds the share of all."""
  size_D = count_DE.sum(1)
  large_D = size_D >= _MIN_SHARE * size_D.sum()
  share_DE = count_DE / np.maximum(size_D, 1)[:, None]
  excess_DE = np.where(large_D[:, None], share_DE - count_DE.sum(0) / size_D.sum(), -np.inf)
  d, e = np.unravel_index(excess_DE.argmax(), excess_DE.shape)
  return int(d), int(e), float(share_DE[d, e])
