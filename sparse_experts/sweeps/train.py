"""Trains the runs of a sweep that are not in the cache, and estimates how long the rest takes."""

import os
import statistics
import time
from collections.abc import Callable, Sequence

from sparse_experts import storage
from sparse_experts.errors import Stopped
from sparse_experts.results import keep_verdict
from sparse_experts.small_files import read_json
from sparse_experts.sweeps.cache import Job, data_of
from sparse_experts.training import metrics


class Clock:
  """Estimates the time left of a sweep from the times of its runs, now and in the cache."""

  def __init__(self):
    self._seconds: dict[str, list[float]] = {}

  def add(self, job: Job) -> None:
    if seconds := _noted(job):
      self._seconds.setdefault(job.arm, []).append(seconds)

  def time_left(self, jobs: Sequence[Job]) -> str:
    """How long `jobs` will take; an arm without a timed run counts as the mean of the others."""
    means, left = {arm: statistics.fmean(s) for arm, s in self._seconds.items()}, "no run was timed yet"
    if means:
      others = statistics.fmean(means.values())
      left = f"about {metrics.clock(sum(means.get(job.arm, others) for job in jobs))}"
    return f"{len(jobs)} run{'s' * (len(jobs) != 1)} to train, {left}"


def train_jobs(jobs: Sequence[Job], clock: Clock, say: Callable[[str], None],
               together: int | None = 1) -> bool:
  """Trains the jobs that are not finished. A run that diverges is noted and the others go on.

  together: number of seeds of an arm trained as one program; None: as many as fit.
  Returns False if it was asked to stop (SIGTERM, SIGHUP): the state is saved, and the same call resumes.
  """
  left = [job for job in jobs if not job.finished]
  while left:
    arm = [job for job in left if job.arm == left[0].arm]
    now = arm[:_number(arm, together)]
    say(f"{', '.join(job.name for job in now)}: {clock.time_left(left)}")
    try:
      _train(now)
    except Stopped:
      return False
    for job in now:
      clock.add(job)
    left = [job for job in left if job not in now]
  return True


def _number(arm: Sequence[Job], together: int | None) -> int:
  """Runs to train together; tuning runs one by one, as a learning rate is a constant of the program."""
  if arm[0].tuning or len(arm) == 1:
    return 1
  if together is None:
    from sparse_experts.sweeps.seeds import seeds_that_fit

    return seeds_that_fit(arm[0].config, arm[0].workdir, len(arm))
  return together


def _train(jobs: Sequence[Job]) -> None:
  """One run, or several of one arm together."""
  from sparse_experts.sweeps import seeds
  from sparse_experts.training import loop
  from sparse_experts.training.session import NonFinite

  start, (job, *others) = time.perf_counter(), jobs
  note_divergence = lambda workdir, e: keep_verdict(workdir, str(e))
  for each in jobs:
    storage.make_folders(each.workdir)
  try:
    if others:
      seeds.train_seeds([j.config for j in jobs], [j.workdir for j in jobs], note_divergence)
    else:
      loop.train(job.config, job.workdir, data=data_of(job.config, tuning=True) if job.tuning else None)
  except NonFinite as e:
    note_divergence(job.workdir, e)
  finally:
    for each in jobs:
      _note(each, _noted(each) + (time.perf_counter() - start) / len(jobs))


def _note(job: Job, seconds: float) -> None:
  """Writes recipe.json: what the key is a hash of, and the seconds of training, without interruptions."""
  storage.write_json(os.path.join(job.workdir, "recipe.json"), job.recipe | {"seconds": seconds})


def _noted(job: Job) -> float:
  try:
    return float(read_json(os.path.join(job.workdir, "recipe.json"), "remove it")["seconds"])
  except (OSError, ValueError, KeyError, TypeError):
    return 0.0
