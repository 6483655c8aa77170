"""Writes a sweep as a Markdown table with notes that explain its columns."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from sparse_experts.analysis.balance import balance, collapsed
from sparse_experts.analysis.compare import Group, difference, number, spread
from sparse_experts.analysis.outcome import train_seconds
from sparse_experts.results import Result

MARK = "†"  # of an arm whose experts are mostly dead
# Columns that stand in the notes instead if they are the same for all arms.
IN_NOTES = ("seeds", "diverged", "learning rate", "pairs")
# What columns are, where the name does not say it.
MEANINGS = {
    "sd": "standard deviation over seeds",
    "dropped": "share of assignments without a slot",
    "dead": "experts that got less than a tenth of an even share in the last 100 steps of training; `train` "
            "and `evaluate` print those of validation data",
    "MaxVio": "the fullest expert's load over the mean one, minus 1",
    "params (active)": "all, and those that a token meets",
    "FLOPs/token": "model FLOPs of a forward pass",
    "seconds": "training of a run, without compiling, evaluating and saving, averaged over runs",
    "ms/step": "the median of a run's logged intervals, averaged over runs"}

Row = dict[str, str]  # {column: cell}
Times = Callable[[Result], tuple[float, float] | None]  # seconds of training and of a step, if any is logged


def logged_times(run: Result) -> tuple[float, float] | None:
  """From the rows of a run that was read whole."""
  return None if run.step_seconds is None else (train_seconds(run), run.step_seconds)


def markdown(groups: Sequence[Group], baseline: str, facts: Mapping[str, Mapping[str, float]]) -> str:
  """The table, a row per arm, and a list of notes.

  facts: `rate`, `params_total`, `params_active` and `flops_per_token` of each arm.
  """
  names, cells, notes = table(groups, baseline, facts)
  return "\n\n".join([aligned([names, *cells]), "\n".join(f"- {note}" for note in notes)])


def table(groups: Sequence[Group], baseline: str, facts: Mapping[str, Mapping[str, float]] | None = None,
          times: Times = logged_times, first: str = "arm",
          paired: bool = True) -> tuple[list[str], list[list[str]], list[str]]:
  """(heads, rows, notes). facts: of `markdown`; without them there are no columns of these.

  times: of a run. first: what a row is. paired: whether the groups compare: if not, no difference is shown.
  """
  base = next((group for group in groups if paired and group.name == baseline), None)
  units = {group.unit for group in groups}
  unit = units.pop() if len(units) == 1 else "final figure"
  rows = [{first: group.name} | _row(group, base, baseline, unit, facts[group.name] if facts else None, times)
          for group in groups]
  same = _same(rows)
  names = [name for name in rows[0] if name not in same]
  return names, [[row[name] for name in names] for row in rows], list(_notes(groups, baseline, same, names))


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Cells as a Markdown table with aligned columns; the first row is its head."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
  return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _row(group: Group, base: Group | None, baseline: str, unit: str, fact: Mapping[str, float] | None,
         times: Times) -> Row:
  of, runs = spread(group.values.values()), group.runs.values()
  mark = f" {MARK}" if collapsed(runs) else ""
  minus, interval, pairs = "", "", ""
  if base is not None and base is not group:
    paired = difference(group, base)
    interval = "none" if paired.interval is None else "{:+.4f} to {:+.4f}".format(*paired.interval)
    minus, pairs = number(paired.mean, "+.4f") + mark, str(paired.n)
  row = {"seeds": str(len(runs)), "diverged": str(group.diverged)}
  row |= {"learning rate": f"{fact['rate']:g}"} if fact else {}
  row |= {unit: number(of.mean) + mark, "sd": number(of.deviation), f"minus {baseline}": minus,
          "95% interval": interval, "pairs": pairs} | _balance(group, mark)
  if fact:
    row |= {"params (active)": f"{short(fact['params_total'])} ({short(fact['params_active'])})",
            "FLOPs/token": short(fact["flops_per_token"])}
  logged = [found for found in map(times, runs) if found is not None]
  mean = lambda i: sum(found[i] for found in logged) / len(logged)
  return row | {"seconds": f"{mean(0):,.1f}" if logged else "none",
                "ms/step": f"{1000 * mean(1):.1f}" if logged else "none"}


def _balance(group: Group, mark: str) -> dict[str, str]:
  """Means over the runs; of arms without experts "-"."""
  found = [b for b in map(balance, group.runs.values()) if b is not None]
  if not found:
    return {"dropped": "-", "dead": "-", "MaxVio": "-"}
  mean = lambda values: sum(values) / len(found)
  return {"dropped": f"{mean(b.dropped for b in found):.1%}",
          "dead": f"{round(mean(b.dead for b in found), 1):g} of {found[0].experts}{mark}",
          "MaxVio": f"{mean(b.max_vio for b in found):.2f}"}


def _same(rows: Sequence[Row]) -> Row:
  """{column: what it says of all arms} of those in IN_NOTES; the baseline has no pairs."""
  said = {name: {row[name] for row in rows if name in row} - ({""} if name == "pairs" else set())
          for name in IN_NOTES}
  return {name: next(iter(values), "") for name, values in said.items() if len(values) <= 1}


def _notes(groups: Sequence[Group], baseline: str, same: Row, names: Sequence[str]) -> Iterator[str]:
  """What the columns are, what is the same for all arms, and what must be known of some."""
  seeds = [list(group.runs) for group in groups]
  of_all = [f"seeds {', '.join(map(str, seeds[0]))}"] if all(of == seeds[0] for of in seeds) else []
  of_all += [f"{name} {same[name]}" for name in ("learning rate", "pairs") if same.get(name)]
  if of_all:
    text = "; ".join(of_all)
    yield f"{text[0].upper()}{text[1:]}."
  if any(group.diverged for group in groups):
    yield "A diverged run has no figure: mean, sd and difference are of the others."
  if len(groups[0].runs) == 1:
    yield "One seed has no spread: no interval."
  for group in groups:
    if text := collapsed(group.runs.values()):
      yield f"{MARK} {group.name}: {text}; its figure is of the experts left."
  yield (f"95% interval: of the mean difference to '{baseline}' between runs of equal seed (paired t), over "
         "the pairs that both finished.")
  in_every_table = ("sd", "dropped", "dead", "MaxVio")
  yield from (f"{name}: {MEANINGS[name]}." for name in in_every_table)
  yield ("dropped, dead, MaxVio: each of the sparse layer where it is worst, in the last logged interval of "
         "training, averaged over runs; - without experts.")
  yield from (f"{name}: {MEANINGS[name]}." for name in names
              if name in MEANINGS and name not in in_every_table)
  scored = [run.last for group in groups for run in group.runs.values() if not run.diverged]
  if scored and len({(last.get("measure"), last.get("data_fingerprint")) for last in scored}) == 1 and (
      "measure" in scored[0]):
    yield f"Measure: {scored[0]['measure']}; data {scored[0].get('data_fingerprint')}."


def short(value: float) -> str:
  """Four digits and a unit: 1234567 -> 1.235M."""
  for unit in ("", "k", "M", "G"):
    if abs(value) < 1000:
      return f"{value:.4g}{unit}"
    value /= 1000
  return f"{value:.4g}T"
