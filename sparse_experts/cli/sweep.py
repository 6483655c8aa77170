"""Trains arms x seeds of a small Python file, and resumes if run again; ends with a table and a picture.

Example: python -m sparse_experts sweep --sweep=experiments/sparse_vs_dense/sweep.py
A run is in RUNS/KEY, where KEY is a hash of config, data and code: a run of another sweep is not trained
again. The table, the picture, its numbers (results.json) and a folder per arm, for `compare`, are in
RUNS/sweeps/NAME.
--config.KEY=VALUE applies to all arms, for example --config.mesh.data=8.
"""

import copy
import os
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from sparse_experts import storage, terminal
from sparse_experts.cli import flags, overrides, router_change
from sparse_experts.config import config_file, load_config
from sparse_experts.errors import UserError, nearest
from sparse_experts.sweeps.cache import DONE, Cache, Job
from sparse_experts.sweeps.jobs import seed_jobs, tuning_jobs
from sparse_experts.sweeps.sweep import RATE, Arm, Sweep
from sparse_experts.sweeps.train import Clock, train_jobs
from sparse_experts.validation import validate

EXAMPLE = "experiments/sparse_vs_dense/sweep.py"


def add_flags(parser):
  parser.add_argument("--sweep", metavar="FILE", help=f"a file with get_sweep(), for example {EXAMPLE}")
  parser.add_argument("--runs", metavar="DIR", default="runs", help="folder of the runs; default runs")
  parser.add_argument("--only", metavar="ARM,ARM", help="train these arms only")
  parser.add_argument("--dry-run", action="store_true", help="print which runs are to be trained, and stop")


def run(args):
  path = flags.need(args, "sweep", EXAMPLE)
  sweep = load(path)
  chosen = choose(args.only, sweep)
  configs = {name: resolve(name, arm, sweep, args.overrides) for name, arm in sweep.arms.items()}

  cache, clock = Cache(args.runs), Clock()
  tuning = tuning_jobs(sweep, configs, cache)
  jobs = seed_jobs(sweep, configs, cache, tuning)
  print("\n".join(plan(sweep, [*tuning, *jobs], chosen, clock)), flush=True)
  if args.dry_run:
    return
  train = lambda jobs: train_jobs(
      [job for job in jobs if job.arm in chosen], clock, lambda text: print(text, flush=True),
      sweep.seeds_together)
  if not train(tuning) or not train(jobs := seed_jobs(sweep, configs, cache, tuning)):
    print("stopped; the same command resumes from here")
    return
  report(os.path.join(args.runs, "sweeps", name_of(path)), sweep, tuning, jobs)


def load(path: str) -> Sweep:
  """get_sweep() of a file."""
  get_sweep = config_file.function("get_sweep", path, f"--sweep={path}", EXAMPLE)
  sweep = config_file.call(path, "get_sweep()", get_sweep)
  if not isinstance(sweep, Sweep):
    raise UserError(f"--sweep={path}: get_sweep() returned {type(sweep).__name__}, not a Sweep; see "
                    f"{EXAMPLE} for one")
  return sweep


def choose(only: str | None, sweep: Sweep) -> list[str]:
  """The arms of --only, all of them without it."""
  names = list(sweep.arms) if only is None else only.split(",")
  for name in names:
    if name not in sweep.arms:
      raise UserError(f"--only={only}: there is no arm '{name}'{nearest(name, sweep.arms)}")
  return names


def resolve(name: str, arm: Arm, sweep: Sweep, common: Sequence[tuple[str, str]]) -> ConfigDict:
  """The config of an arm, with its overrides and those of the command line, validated."""
  try:
    config = load_config(arm.config)
    before = copy.deepcopy(config)
    for key, text in (*((k, overrides.show(v)) for k, v in arm.overrides.items()), *common):
      overrides.override(config, key, text)
      if key == "train.seed" or (key == RATE and sweep.learning_rates):
        source = "seeds" if key == "train.seed" else "learning_rates"
        raise UserError(f"{key} is set, but it comes from the sweep's {source}; leave one of them out")
    notes = router_change.apply(config, before, [*arm.overrides, *(key for key, _ in common)])
    validate(config)
    devices = config.mesh.data * config.mesh.expert * config.mesh.model
    if (sweep.seeds_together or 1) > 1 and devices > 1:
      raise UserError(f"seeds_together={sweep.seeds_together} is for one device, and the mesh has {devices}; "
                      "leave one of them out")
  except UserError as e:
    raise UserError(f"arm '{name}': {e}") from None
  for line in notes:
    terminal.tell(f"arm '{name}': {line}")
  return config


def name_of(path: str) -> str:
  """The name of a sweep's results: of the folder if its file is sweep.py, else of the file."""
  folder, file = os.path.split(os.path.abspath(path))
  stem = os.path.splitext(file)[0]
  return os.path.basename(folder) if stem == "sweep" else stem


def plan(sweep: Sweep, jobs: Sequence[Job], chosen: Sequence[str], clock: Clock) -> list[str]:
  """A line per run, cached or to be trained, and the time left; `clock` gets the times of cached runs."""
  lines, left = [], []
  for job in jobs:
    state = job.state()
    if state == DONE:
      clock.add(job)
    elif job.arm in chosen:
      left.append(job)
    lines.append(f"{job.name}: {state}, {job.workdir}"
                 + (" (not among --only)" if state != DONE and job.arm not in chosen else ""))
  waiting = [arm for arm in chosen if not any(job.arm == arm and not job.tuning for job in jobs)]
  later = len(waiting) * len(list(sweep.seeds))
  lines.append(clock.time_left(left) + (f"; then {later} with the best learning rates" if later else ""))
  return lines


def report(folder: str, sweep: Sweep, tuning: Sequence[Job], jobs: Sequence[Job]) -> None:
  """Writes runs.json of each finished arm, the table, which is printed too, results.json and the picture."""
  from sparse_experts.analysis import compare, table
  from sparse_experts.analysis.outcome import outcome
  from sparse_experts.report import pictures, plots

  groups, facts = [], {}
  for arm in sweep.arms:
    its = [job for job in jobs if job.arm == arm]
    if not its or not all(job.finished for job in its):
      print(f"arm '{arm}' is not finished and is left out of the table")
      continue
    groups.append(compare.make_group(arm, [job.workdir for job in its]))
    facts[arm] = sizes(its[0]) | {"rate": its[0].config.optimizer.learning_rate}
    storage.make_folders(os.path.join(folder, arm))
    storage.write_json(os.path.join(folder, arm, "runs.json"), {
        "runs": [storage.relative(job.workdir, f"{folder}/{arm}") for job in its]})
  if not groups:
    return
  compare.check(groups)
  text = "\n- ".join([table.markdown(groups, sweep.base, facts), *tuning_notes(sweep, tuning, facts)])
  storage.write(os.path.join(folder, "table.md"), text + "\n")
  found = outcome(groups, sweep.base)
  storage.write_json(os.path.join(folder, "results.json"), found)
  plots.save(pictures.arms(found), os.path.join(folder, "picture.png"))
  print(f"\n{text}\n\n{folder} holds table.md, results.json, picture.png and a folder for each arm; for two "
        f"of them: python -m sparse_experts compare {folder}/ARM {folder}/ARM")


def sizes(job: Job) -> dict[str, float]:
  """params_total, params_active and flops_per_token of a run's model."""
  from sparse_experts.models import counts
  from sparse_experts.tasks import task_of
  from sparse_experts.training.workdir import read_tokenizer

  tokenizer = read_tokenizer(job.workdir, job.config)
  assert tokenizer is not None  # the run is finished
  targets = task_of(job.config).row_lengths(tokenizer)["targets"]
  return counts.describe(job.config, tokenizer.vocab_size, targets)


def tuning_notes(sweep: Sweep, tuning: Sequence[Job], facts: Mapping[str, Mapping]) -> list[str]:
  """How the learning rates were chosen, and arms whose best rate is the smallest or largest tried."""
  if not tuning:
    return []
  tried = ", ".join(f"{rate:g}" for rate in sorted(sweep.learning_rates))
  edges = [f"the best of '{arm}', {fact['rate']:g}, is the {which} tried: a {other} one may be better"
           for which, other, edge in (("smallest", "smaller", min(sweep.learning_rates)),
                                      ("largest", "larger", max(sweep.learning_rates)))
           for arm, fact in facts.items() if fact["rate"] == edge]
  return [f"Learning rates tried by each arm: {tried}, each with one run of seed {sweep.tuning_seed}, scored "
          "on documents held out of the training text; no reported seed or document had a part in the choice"
          + "".join(f"; {edge}" for edge in edges) + "."]
