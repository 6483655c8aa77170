"""Writes a sweep as a Markdown table with notes that explain its columns."""

from collections.abc import Iterator, Mapping, Sequence

from sparse_experts.analysis.balance import balance, collapsed
from sparse_experts.analysis.compare import Group, difference, number, spread
from sparse_experts.analysis.outcome import train_seconds

MARK = "†"  # of an arm whose experts are mostly dead
# Columns that stand in the notes instead if they are the same for all arms.
IN_NOTES = ("seeds", "diverged", "learning rate", "pairs")


def markdown(groups: Sequence[Group], baseline: str, facts: Mapping[str, Mapping[str, float]]) -> str:
  """The table, a row per arm, and a paragraph of notes.

  facts: `rate`, `params_total`, `params_active` and `flops_per_token` of each arm.
  """
  base = next((group for group in groups if group.name == baseline), None)
  rows = [_row(group, base, baseline, facts[group.name]) for group in groups]
  same = _same(rows)
  names = [name for name in rows[0] if name not in same]
  return "\n\n".join([aligned([names, *([row[name] for name in names] for row in rows)]),
                      " ".join(_notes(groups, baseline, same))])


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Cells as a Markdown table with aligned columns; the first row is its head."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
  return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _row(group: Group, base: Group | None, baseline: str, fact: Mapping[str, float]) -> dict[str, str]:
  of, runs = spread(group.values.values()), group.runs.values()
  mark = f" {MARK}" if collapsed(runs) else ""
  minus, interval, pairs = "", "", ""
  if base is not None and base is not group:
    paired = difference(group, base)
    interval = "none" if paired.interval is None else "{:+.4f} to {:+.4f}".format(*paired.interval)
    minus, pairs = number(paired.mean, "+.4f") + mark, str(paired.n)
  row = {"arm": group.name, "seeds": str(len(runs)), "diverged": str(group.diverged),
         "learning rate": f"{fact['rate']:g}", group.unit: number(of.mean) + mark, "sd": number(of.deviation),
         f"minus {baseline}": minus, "95% interval": interval, "pairs": pairs}
  steps = [run.step_seconds for run in runs if run.step_seconds is not None]
  return row | _balance(group, mark) | {
      "params (active)": f"{short(fact['params_total'])} ({short(fact['params_active'])})",
      "FLOPs/token": short(fact["flops_per_token"]),
      "seconds": "none" if not steps else f"{sum(map(train_seconds, runs)) / len(runs):,.1f}",
      "ms/step": "none" if not steps else f"{1000 * sum(steps) / len(steps):.1f}"}


def _balance(group: Group, mark: str) -> dict[str, str]:
  """Means over the runs; of arms without experts "-"."""
  found = [b for b in map(balance, group.runs.values()) if b is not None]
  if not found:
    return {"dropped": "-", "dead": "-", "MaxVio": "-"}
  mean = lambda values: sum(values) / len(found)
  return {"dropped": f"{mean(b.dropped for b in found):.1%}",
          "dead": f"{round(mean(b.dead for b in found), 1):g} of {found[0].experts}{mark}",
          "MaxVio": f"{mean(b.max_vio for b in found):.2f}"}


def _same(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
  """{column: what it says of all arms} of those in IN_NOTES; the baseline has no pairs."""
  said = {name: {row[name] for row in rows} - ({""} if name == "pairs" else set()) for name in IN_NOTES}
  return {name: next(iter(values), "") for name, values in said.items() if len(values) <= 1}


def _notes(groups: Sequence[Group], baseline: str, same: Mapping[str, str]) -> Iterator[str]:
  """What the columns are, what is the same for all arms, and what must be known of some."""
  of_all = [f"; {name} {same[name]}" for name in ("learning rate", "pairs") if same.get(name)]
  yield f"Seeds {', '.join(map(str, groups[0].runs))}{''.join(of_all)}."
  yield ("sd: standard deviation over seeds. 95% interval: of the mean difference to "
         f"'{baseline}' between runs of equal seed (paired t), over the pairs that both finished.")
  scored = [run for group in groups for run in group.runs.values() if not run.diverged]
  if scored:
    yield f"Measure: {scored[0].last['measure']}; data {scored[0].last['data_fingerprint']}."
  if any(group.diverged for group in groups):
    yield "A diverged run has no figure: mean, sd and difference are of the others."
  if len(groups[0].runs) == 1:
    yield "One seed has no spread: no interval."
  for group in groups:
    if text := collapsed(group.runs.values()):
      yield f"{MARK} {group.name}: {text}; its figure is of the experts left."
  yield ("dropped: share of assignments without a slot; dead: experts with less than a tenth of an even "
         "share; MaxVio: the fullest expert's load over the mean one, minus 1. Each is of the sparse layer "
         "where it is worst, in the last logged interval of training (dead: in its last 100 steps), averaged "
         "over runs; - without experts.")
  yield ("params (active): all, and those that a token meets. FLOPs/token: model FLOPs of a forward pass. "
         "seconds: training of a run, without compiling, evaluating and saving, averaged over runs. ms/step: "
         "the median of a run's logged intervals, averaged over runs.")


def short(value: float) -> str:
  """Four digits and a unit: 1234567 -> 1.235M."""
  for unit in ("", "k", "M", "G"):
    if abs(value) < 1000:
      return f"{value:.4g}{unit}"
    value /= 1000
  return f"{value:.4g}T"
