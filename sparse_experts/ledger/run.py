"""Runs a claim at a scale: trains what is missing, measures, judges, and appends the result."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sparse_experts import storage
from sparse_experts.analysis import compare
from sparse_experts.errors import UserError
from sparse_experts.ledger import verdict
from sparse_experts.ledger.claim_file import Claim, digest
from sparse_experts.small_files import Damaged, read_json
from sparse_experts.sweeps.cache import Cache, Job
from sparse_experts.sweeps.jobs import seed_jobs
from sparse_experts.sweeps.sweep import Arm, Sweep
from sparse_experts.sweeps.train import Clock, train_jobs

Say = Callable[[str], None]
# Of a trained run: what is claimed of it; None if it diverged.
Measure = Callable[[Job], float | None]
Figures = dict[str, dict[str, float | None]]


# What a claim is run for: its result; other seeds, from which delta and the number of seeds are chosen; or
# two seeds of a few steps, which prove only that it runs.
COUNTED, PILOT, QUICK = "counted", "pilot", "quick"
QUICK_OVERRIDES = (("train.steps", "4"), ("train.log_every", "2"), ("eval.min_bytes", "2000"))


def seeds_of(claim: Claim, scale: str, purpose: str) -> list[int]:
  """The seeds of a paired claim. Raises UserError if it names none for a pilot."""
  plan = claim.fixed["scales"][scale]
  if purpose != PILOT:
    return plan["seeds"] if purpose == COUNTED else plan["seeds"][:2]
  seeds = plan["pilot"].get("seeds", [])
  if len(seeds) < 2:
    raise UserError(f"{claim.path}, scale {scale}: a pilot wants two seeds or more that no result counts; "
                    f'give them as "pilot": {{"seeds": [100, 101, 102]}}')
  return seeds


def sweep_of(claim: Claim, scale: str, purpose: str = COUNTED) -> Sweep:
  """A paired claim's arms and seeds as a sweep; an arm's overrides come after those of the scale."""
  plan, arms = claim.fixed["scales"][scale], claim.fixed["arms"]
  return Sweep(
      arms={name: Arm(arm["config"], {**plan.get("overrides", {}), **arm.get("overrides", {})})
            for name, arm in arms.items()},
      seeds=seeds_of(claim, scale, purpose), baseline=claim.fixed["baseline"])


def train(sweep: Sweep, configs: Mapping[str, ConfigDict], runs: str, say: Say) -> list[Job] | None:
  """The finished runs of a paired claim; None if it was asked to stop: the same call resumes."""
  cache = Cache(runs)
  jobs = seed_jobs(sweep, configs, cache, [])
  return jobs if train_jobs(jobs, Clock(), say, sweep.seeds_together) else None


def primary(job: Job) -> float | None:
  """The run's primary figure; None if it diverged."""
  result = job.result()
  assert result is not None  # it was trained
  return result.primary


def figures_of(jobs: Sequence[Job], measure: Measure) -> Figures:
  """{arm: {seed: figure}}; seeds are text, as in JSON."""
  found: Figures = {}
  for job in jobs:
    found.setdefault(job.arm, {})[str(job.config.train.seed)] = measure(job)
  return found


def computed(claim: Claim, scale: str, measure: Callable[[Mapping[str, Any], int, bool], float | None],
             code: str, runs: str, purpose: str, say: Say) -> Figures:
  """Figures of arms that are no configs: `measure(arm, seed, quick)` of each arm and seed.

  Each is kept as soon as it is there, under the hash of what was fixed and of the code: after a kill the same
  call goes on.
  """
  seeds, quick = seeds_of(claim, scale, purpose), purpose == QUICK
  path = kept_at(runs, claim, scale if purpose == COUNTED else f"{scale}_{purpose}")
  # A pilot goes on where its file changed: delta and the number of seeds are what it is run for.
  key = {"fixed": claim.fixed["arms"] if purpose == PILOT else digest(claim.fixed, []), "code": code}
  kept = _read(path)
  found: Figures = kept["figures"] if kept.get("key") == key else {}
  todo = [(arm, seed) for seed in seeds for arm in claim.fixed["arms"] if str(seed) not in found.get(arm, {})]
  started = time.monotonic()
  for i, (arm, seed) in enumerate(todo):
    found.setdefault(arm, {})[str(seed)] = value = measure(claim.fixed["arms"][arm], seed, quick)
    storage.write_json(path, {"key": key, "figures": found})
    left = (time.monotonic() - started) / (i + 1) * (len(todo) - i - 1)
    said = "diverged" if value is None else f"{value:.4f}"
    say(f"{arm}, seed {seed}: {said}; {left / 60:.1f} minutes left")
  return found


def _read(path: str) -> dict[str, Any]:
  try:
    return read_json(path, "remove it")
  except (FileNotFoundError, Damaged):
    return {}  # nothing is kept yet, or nothing that can be used


def judged(claim: Claim, figures: Figures, control: str | None) -> dict[str, Any]:
  """The verdict and what it rests on. `control`: the verdict of the claim's positive control, if it has one.

  A pair with a run that diverged has no difference; with fewer pairs than were fixed, or a control that was
  not shown, nothing is decided: underpowered.
  """
  fixed = claim.fixed
  a, b = figures[fixed["tested"]], figures[fixed["baseline"]]
  pairs = {seed: (a[seed], b[seed]) for seed in a if seed in b}
  differences = [x - y for x, y in pairs.values() if x is not None and y is not None]
  diverged = {arm: sum(value is None for value in of.values()) for arm, of in figures.items()}
  if len(differences) < 2:
    return {"verdict": verdict.UNDERPOWERED, "diverged": diverged,
            "why": "fewer than two pairs have a figure"}
  found = verdict.judge(differences, fixed["sign"], fixed["delta"])
  result = {"verdict": found.verdict, "pairs": found.pairs, "mean": found.mean, "deviation": found.deviation,
            "interval": [found.low, found.high], "interval_90": [found.low_90, found.high_90],
            "seeds_needed": found.seeds_needed, "diverged": diverged,
            "power": round(verdict.power(found.pairs, found.deviation, fixed["delta"], fixed["sign"]), 3)}
  if len(differences) < len(pairs):
    result |= {"verdict": verdict.UNDERPOWERED,
               "why": f"{len(pairs) - len(differences)} of {len(pairs)} pairs have a run that diverged"}
  elif control not in (None, verdict.SHOWN):
    result |= {"verdict": verdict.UNDERPOWERED, "why": f"its positive control was not shown: {control}"}
  return result


def pilot(claim: Claim, scale: str, figures: Figures) -> str:
  """What a pilot says: the deviation of its paired differences, and the seeds that would reveal delta."""
  found = judged(claim, figures, None)
  if "mean" not in found:
    return f"{claim.name}: {found['why']}"
  delta, n = claim.fixed["delta"], len(claim.fixed["scales"][scale]["seeds"])
  power = verdict.power(n, found["deviation"], delta, claim.fixed["sign"])
  return (f"{claim.name}: mean {found['mean']:+.4g}, deviation {found['deviation']:.4g} of {found['pairs']} "
          f"pairs; delta {delta:g} takes {found['seeds_needed']} seeds for a power of {verdict.POWER:.0%}, "
          f"and {n} seeds have {power:.0%}. Write the deviation into the claim's pilot, and delta and seeds "
          "so that they fit")


def published(claim: Claim, figures: Sequence[verdict.Figure]) -> dict[str, Any]:
  """The verdict on published numbers, each beside ours."""
  return {"verdict": verdict.judge_published(figures, claim.fixed["at_least"]),
          "inside": sum(figure.holds for figure in figures), "of": len(figures),
          "figures": [vars(figure) for figure in figures]}


def about(started: float, data: str, code: str) -> dict[str, Any]:
  """What a result was made with."""
  import jax

  from sparse_experts.version import versions

  return {"data": data, "code": code, "versions": versions(), "device": jax.devices()[0].device_kind,
          "machine": platform.machine(), "cores": os.cpu_count(),
          "minutes": round((time.monotonic() - started) / 60, 2)}


def keep_quick(runs: str, claim: Claim, result: Mapping[str, Any]) -> str:
  """Writes what --quick found, which is no result, beside the runs; returns where."""
  storage.write_json(path := kept_at(runs, claim, "quick"), result)
  return path


def kept_at(runs: str, claim: Claim, what: str) -> str:
  """A file beside the runs, for what a claim keeps."""
  path = os.path.join(runs, "claims", f"{claim.name.replace('/', '_')}_{what}.json")
  storage.make_folders(os.path.dirname(path))
  return path


def check_scale(claim: Claim, scale: str) -> None:
  """Refuses a scale that the claim has no plan for, or whose hardware is not here."""
  if scale not in claim.fixed["scales"]:
    raise UserError(f"claim {claim.name} fixes nothing for --scale={scale}; it has "
                    f"{', '.join(claim.fixed['scales']) or 'no scale'}")
  import jax

  here = jax.default_backend()
  if here != scale:
    raise UserError(f"--scale={scale} needs a {scale.upper()}, and jax found {here}; a claim's plan is for "
                    "its own hardware")


def check_one_data(jobs: Sequence[Job]) -> str:
  """The data's fingerprint of all arms. Raises UserError where they differ, as `compare` does."""
  groups = [compare.group_of(arm, [job.result() for job in jobs if job.arm == arm])  # type: ignore[misc]
            for arm in dict.fromkeys(job.arm for job in jobs)]
  compare.check(groups)
  return jobs[0].recipe["data"]
