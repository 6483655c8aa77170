"""Writes a sweep as a Markdown table with notes."""

from collections.abc import Mapping, Sequence

from sparse_experts.analysis.compare import Group, difference, number, spread

COLUMNS = ("arm", "seeds", "diverged", "learning rate", "{unit}", "sd", "minus {baseline}", "95% interval",
           "pairs", "params", "active", "FLOPs/token", "ms/step")


def markdown(groups: Sequence[Group], baseline: str, facts: Mapping[str, Mapping[str, float]]) -> str:
  """One row per arm. facts: `rate`, `params_total`, `params_active` and `flops_per_token` of each."""
  base = next((group for group in groups if group.name == baseline), None)
  rows = [[column.format(baseline=baseline, unit=groups[0].unit) for column in COLUMNS]]
  return aligned(rows + [_row(group, base, facts[group.name]) for group in groups])


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Cells as a Markdown table with aligned columns; the first row is its head."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
  return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _row(group: Group, base: Group | None, fact: Mapping[str, float]) -> list[str]:
  of = spread(group.values.values())
  row = [group.name, str(len(group.runs)), str(group.diverged), f"{fact['rate']:g}", number(of.mean),
         number(of.deviation)]
  if base is None or base is group:
    row += ["", "", ""]
  else:
    paired = difference(group, base)
    interval = "none" if paired.interval is None else "{:+.4f} to {:+.4f}".format(*paired.interval)
    row += [number(paired.mean, "+.4f"), interval, str(paired.n)]
  seconds = [run.step_seconds for run in group.runs.values() if run.step_seconds is not None]
  return row + [short(fact["params_total"]), short(fact["params_active"]), short(fact["flops_per_token"]),
                f"{1000 * sum(seconds) / len(seconds):.1f}" if seconds else "none"]


def notes(groups: Sequence[Group], baseline: str) -> str:
  """What the figures and intervals of the table mean."""
  seeds = ", ".join(map(str, groups[0].runs))
  scored = [run for group in groups for run in group.runs.values() if not run.diverged]
  lines = [f"Seeds {seeds}. sd: standard deviation over seeds. 95% interval: of the mean difference to "
           f"'{baseline}' between runs of equal seed (paired t), over the pairs that both finished."]
  if scored:
    last = scored[0].last
    lines.append(f"Measure: {last['measure']}; data {last['data_fingerprint']}.")
  if any(group.diverged for group in groups):
    lines.append("A diverged run has no figure: mean, sd and difference are of the others.")
  if len(groups[0].runs) == 1:
    lines.append("One seed has no spread: no interval.")
  lines.append("FLOPs/token: model FLOPs of a forward pass. ms/step: measured; the median of a run's logged "
               "intervals, averaged over runs.")
  return " ".join(lines)


def short(value: float) -> str:
  """Four digits and a unit: 1234567 -> 1.235M."""
  for unit in ("", "k", "M", "G"):
    if abs(value) < 1000:
      return f"{value:.4g}{unit}"
    value /= 1000
  return f"{value:.4g}T"
