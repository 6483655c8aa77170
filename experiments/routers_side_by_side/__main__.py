"""Every router on a stream whose best routing is known: trains what is not in results.json yet, then tells.

Example: python -m experiments.routers_side_by_side
It goes on where it stopped. results.json, table.md and picture.png lie in --out.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence

from experiments import command
from experiments.routers_side_by_side import report
from experiments.routers_side_by_side.arms import ARMS, ORACLE, RANDOM, RATES, SEEDS, SWITCH, TUNING_SEED
from experiments.routers_side_by_side.train import Program, Setting, step_seconds
from sparse_experts import storage
from sparse_experts.errors import UserError, nearest
from sparse_experts.report import plots
from sparse_experts.training.metrics import clock

GUESS = 4.0  # seconds of a run, compiling included, while none is in results.json; on two busy cores


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a command trains."""

  setting: Setting = dataclasses.field(default_factory=Setting)
  arms: Sequence[str] = tuple(ARMS)
  rates: Sequence[float] = RATES
  seeds: Sequence[int] = tuple(SEEDS)

  @property
  def runs(self) -> int:
    return len(self.arms) * (len(self.rates) + len(self.seeds))


QUICK = Plan(Setting(steps=30, eval_groups=8), (ORACLE, RANDOM), RATES[1:2], tuple(SEEDS)[:2])


class Results:
  """results.json: a row per run and per timing, written anew after each of them."""

  def __init__(self, folder: str):
    self.path = os.path.join(folder, "results.json")
    try:
      with open(self.path, encoding="utf-8") as f:
        self.rows = json.load(f)
    except FileNotFoundError:
      self.rows = []
    except ValueError as e:
      raise UserError(f"{self.path} cannot be read ({e}); restore it, or remove it to start anew") from None

  def find(self, **keys) -> report.Row | None:
    return next((row for row in self.rows if keys.items() <= row.items()), None)

  def add(self, row: report.Row) -> report.Row:
    self.rows.append(row)
    storage.write(self.path, "[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
    return row

  def seconds(self, arm: str) -> float:
    """Of a run of the arm, compiled already; the mean of all, compiling included, if it has none yet."""
    timed = [row for row in self.rows if "seconds" in row]
    own = [row["seconds"] for row in timed if row["arm"] == arm]
    if own:
      return min(own)
    return sum(row["seconds"] for row in timed) / len(timed) if timed else GUESS


class Progress:
  """Says what is done and what is left."""

  def __init__(self, plan: Plan, results: Results):
    self.results = results
    self.each = len(plan.rates) + len(plan.seeds)
    self.left = dict.fromkeys(plan.arms, self.each)

  def remaining(self) -> str:
    return clock(sum(n * self.results.seconds(arm) for arm, n in self.left.items()))

  def done(self, arm: str, text: str) -> None:
    self.left[arm] -= 1
    total = self.each * len(self.left)
    done = total - sum(self.left.values())
    print(f"[{done}/{total}] {arm} {text}; about {self.remaining()} left", flush=True)


def train(plan: Plan, results: Results) -> tuple[dict[str, dict[int, report.Row]], dict[str, float]]:
  """({arm: {seed: row}}, {arm: step time over Switch's}), trained where results.json has none."""
  progress, reported, step_times = Progress(plan, results), {}, {}
  switch = Program(plan.setting, *ARMS[SWITCH])
  for arm in plan.arms:
    program = switch if arm == SWITCH else Program(plan.setting, *ARMS[arm])
    tuning = [run(arm, program, rate, TUNING_SEED, results, progress) for rate in plan.rates]
    rate = report.best_rate(tuning)
    reported[arm] = {seed: run(arm, program, rate, seed, results, progress) for seed in plan.seeds}
    step_times[arm] = timed(arm, program, switch, results)["step_time"]
  return reported, step_times


def run(arm, program, rate, seed, results, progress) -> report.Row:
  at = dict(arm=arm, key=program.key, rate=rate, seed=seed)
  text = f"rate {rate:g} seed {seed}: "
  row = results.find(**at)
  if row:
    progress.done(arm, text + "in results.json")
    return row
  begin = time.perf_counter()
  found = program.run(rate, seed)
  if not math.isfinite(found["loss"]):
    found = {"loss": None}  # diverged
  row = results.add({**at, **found, "seconds": time.perf_counter() - begin})
  progress.done(arm, text + ("diverged" if row["loss"] is None else f"{row['loss']:.4f} nats"))
  return row


def timed(arm, program, switch, results) -> report.Row:
  at = dict(arm=arm, key=program.key, against=switch.key)
  row = results.find(**at)
  if row is None:
    own, other = step_seconds([program, switch]) if program is not switch else (1.0, 1.0)
    row = results.add({**at, "step_time": own / other})
  return row


def choose(plan: Plan, only: str | None) -> Plan:
  if only is None:
    return plan
  for name in only.split(","):
    if name not in ARMS:
      raise UserError(f"--only={only}: there is no arm '{name}'{nearest(name, ARMS)}")
  return dataclasses.replace(plan, arms=[a for a in ARMS if a in (ORACLE, RANDOM, *only.split(","))])


def main(argv: Sequence[str]) -> int:
  parser = command.parser("routers_side_by_side", __doc__)
  parser.add_argument("--out", metavar="DIR", default="runs/routers_side_by_side",
                      help="folder of the results; default runs/routers_side_by_side")
  parser.add_argument("--only", metavar="ARM,ARM", help="these arms, beside the references")
  parser.add_argument("--quick", action="store_true", help="two arms and a few steps: does it work?")
  parser.add_argument("--dry-run", action="store_true", help="say what it costs, and stop")
  return command.main(parser, compare, argv)


def compare(args) -> None:
  plan = QUICK if args.quick else choose(Plan(), args.only)
  results = Results(args.out)
  print(f"{len(plan.arms)} arms x ({len(plan.rates)} rates + {len(plan.seeds)} seeds) = {plan.runs} runs, "
        f"about {Progress(plan, results).remaining()} if none of them is done yet", flush=True)
  if args.dry_run:
    return
  os.makedirs(args.out, exist_ok=True)
  arms, step_times = train(plan, results)
  text = "\n\n".join([report.markdown(arms, step_times, plan.setting),
                      report.notes(arms, plan.rates, plan.setting)])
  storage.write(os.path.join(args.out, "table.md"), text + "\n")
  plots.save(report.draw(arms), os.path.join(args.out, "picture.png"))
  print(f"\n{text}\n\n{args.out} holds table.md and picture.png")


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
