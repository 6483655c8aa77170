"""Results as a table, with what a reader must know beside it, and a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.routers_side_by_side.arms import ORACLE, RANDOM, SWITCH, TUNING_SEED
from experiments.routers_side_by_side.train import Setting
from sparse_experts.analysis import table
from sparse_experts.analysis.compare import Spread, number, spread
from sparse_experts.report import plots
from sparse_experts.report.picture import Picture

COLUMNS = ("arm", "learning rate", "seeds", "diverged", "nats", "above floor", "oracle gap", "95% interval",
           "agreement", "experts/token", "load cv", "unserved", "step time")

Row = dict[str, Any]  # of results.json
Seeds = Mapping[int, Row]


def best_rate(tuning: Sequence[Row]) -> float:
  """With the lowest loss; a run that diverged has none, and of equals the lowest rate is taken."""
  return min(tuning, key=lambda row: (row["loss"] is None, row["loss"] or 0.0, row["rate"]))["rate"]


def gaps(arm: Seeds, oracle: Seeds, random: Seeds) -> dict[int, float]:
  """{seed: (loss - oracle's) / (random's - oracle's)}, of seeds on which all three have a loss."""
  loss = lambda rows, seed: rows[seed]["loss"] if seed in rows else None
  found = {seed: [loss(rows, seed) for rows in (arm, oracle, random)] for seed in arm}
  return {seed: (a - o) / (r - o) for seed, (a, o, r) in found.items() if None not in (a, o, r)}


def control(oracle: Seeds, random: Seeds) -> Spread:
  """Random routing's loss minus the oracle's, of equal seeds: what the task can tell at all."""
  both = [seed for seed in oracle if seed in random]
  pairs = [(random[seed]["loss"], oracle[seed]["loss"]) for seed in both]
  return spread(r - o for r, o in pairs if None not in (r, o))


def markdown(arms: Mapping[str, Seeds], step_times: Mapping[str, float], setting: Setting) -> str:
  """A row per arm, the smallest gap first."""
  rows = [_row(name, seeds, arms, step_times, setting) for name, seeds in arms.items()]
  return table.aligned([COLUMNS, *(cells for _, cells in sorted(rows, key=lambda row: row[0]))])


def _row(name, seeds, arms, step_times, setting):
  of = lambda key: spread(row[key] for row in seeds.values() if row.get(key) is not None).mean
  digits = lambda key, n: "" if of(key) is None else f"{of(key):.{n}f}"
  loss, gap = of("loss"), spread(gaps(seeds, arms[ORACLE], arms[RANDOM]).values())
  exact = name in (ORACLE, RANDOM)  # 0 and 1 by definition
  interval = "" if exact or gap.interval is None else "{:.3f} to {:.3f}".format(*gap.interval)
  order = float("inf") if gap.mean is None else gap.mean
  return order, [
      name, f"{next(iter(seeds.values()))['rate']:g}", str(len(seeds)),
      str(sum(row["loss"] is None for row in seeds.values())), number(loss),
      "none" if loss is None else f"{loss - setting.stream.floor:.4f}",
      "none" if gap.mean is None else f"{gap.mean:.3f}", interval, digits("agreement", 2),
      digits("experts_per_token", 2), digits("load_cv", 2), digits("unserved", 3),
      f"{step_times[name]:.2f}" if name in step_times else ""]


def notes(arms: Mapping[str, Seeds], rates: Sequence[float], setting: Setting) -> str:
  """What the figures are of, and whether they can mean anything."""
  held = control(arms[ORACLE], arms[RANDOM])
  low = None if held.interval is None else held.interval[0]
  seeds = ", ".join(map(str, next(iter(arms.values()))))
  lines = [
      f"Seeds {seeds}; {setting.steps} steps, {setting.tokens:,} tokens a run. nats: per target, on "
      f"{setting.eval_groups * setting.group_tokens:,} tokens that no run trains on; the floor is "
      f"{setting.stream.floor:.4f}.",
      f"oracle gap: 0 for '{ORACLE}', 1 for '{RANDOM}', paired by seed; the interval is its mean's (t).",
      "agreement: mutual information of cluster and expert over the clusters' entropy. unserved: tokens "
      f"without an expert. step time: over {SWITCH}'s, in turns, at the start of training.",
      f"Control: '{RANDOM}' minus '{ORACLE}' is {number(held.mean)} nats, "
      + ("without an interval: one seed says nothing of the spread." if low is None else
         "95% interval {:.4f} to {:.4f}.".format(*held.interval)
         + ("" if low > 0 else " It does not exclude 0, so the gaps mean nothing.")),
      f"Learning rates tried by each arm: {', '.join(f'{rate:g}' for rate in rates)}, each with one run of "
      f"seed {TUNING_SEED}, which is another task and is not reported."]
  for which, other, rate in (("smallest", "smaller", min(rates)), ("largest", "larger", max(rates))):
    edge = [name for name, of in arms.items() if next(iter(of.values()))["rate"] == rate]
    if edge and len(rates) > 1:
      lines.append(f"The best is the {which} tried, and a {other} one may be better: {', '.join(edge)}.")
  return " ".join(lines)


def reported(rows: Sequence[Row]) -> dict[str, Seeds]:
  """{arm: {seed: its run with the best rate}} of the rows of results.json."""
  arms: dict[str, Seeds] = {}
  for arm in dict.fromkeys(row["arm"] for row in rows):
    of = [row for row in rows if row["arm"] == arm and "seed" in row]
    rate = best_rate([row for row in of if row["seed"] == TUNING_SEED])
    arms[arm] = {row["seed"]: row for row in of if row["seed"] != TUNING_SEED and row["rate"] == rate}
  return arms


def draw(arms: Mapping[str, Seeds]) -> Picture:
  """Every seed's gap with its arm's mean and interval, the best arm first, and gap against agreement."""
  found = {name: gaps(seeds, arms[ORACLE], arms[RANDOM]) for name, seeds in arms.items()}
  mean = {name: spread(values.values()).mean for name, values in found.items() if values}
  names = sorted(mean, key=mean.get)
  picture, (by_arm, by_agreement) = plots.panels("AABBB", 10, 1.5 + 0.27 * len(names), arms=names)
  plots.seeds(by_arm, {name: found[name] for name in names},
              f"oracle gap: 0 is '{ORACLE}', 1 is '{RANDOM}'")
  plots.title(by_arm, "a point per seed; mean and its 95% t-interval")
  agreed = lambda name: (row["agreement"] for row in arms[name].values() if row.get("agreement") is not None)
  agreement = {name: spread(agreed(name)) for name in names}
  plots.scatter(by_agreement, {name: (of.mean, mean[name]) for name, of in agreement.items() if of.n},
                "agreement of experts with clusters: 0 none, 1 whole", "oracle gap, mean over seeds")
  return picture
