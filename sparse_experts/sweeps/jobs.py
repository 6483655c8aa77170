"""The runs of a sweep: first those that choose each arm's learning rate, then those that are reported.

Every arm tries the same rates, each with one run of the tuning seed, scored on documents held out of the
training split. No reported seed or document is used to choose a rate.
"""

import math
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from sparse_experts.errors import UserError
from sparse_experts.sweeps.cache import Cache, Job
from sparse_experts.sweeps.sweep import Sweep
from sparse_experts.tasks import task_of


def tuning_jobs(sweep: Sweep, configs: Mapping[str, ConfigDict], cache: Cache) -> list[Job]:
  return [cache.job(arm, config, sweep.tuning_seed, rate, tuning=True)
          for rate in sweep.learning_rates for arm, config in configs.items()]


def best_rates(tuning: Sequence[Job]) -> dict[str, float]:
  """{arm: the learning rate with the lowest loss on held-out documents} of arms that have tried them all.

  A diverged run counts as an infinite loss; ties go to the lowest rate.
  """

  def order(job):
    value = job.result().primary
    return math.inf if value is None else value, job.config.optimizer.learning_rate

  arms = dict.fromkeys(job.arm for job in tuning)
  by_arm = {arm: [job for job in tuning if job.arm == arm] for arm in arms}
  return {arm: min(jobs, key=order).config.optimizer.learning_rate for arm, jobs in by_arm.items()
          if all(job.finished for job in jobs)}


def seed_jobs(sweep: Sweep, configs: Mapping[str, ConfigDict], cache: Cache,
              tuning: Sequence[Job]) -> list[Job]:
  """The runs that are reported, of arms whose learning rate is known.

  One seed of every arm comes before the next seed, so that early comparisons are paired.
  """
  rates = best_rates(tuning)
  jobs = [cache.job(arm, config, seed, rates.get(arm)) for seed in sweep.seeds
          for arm, config in configs.items() if arm in rates or not tuning]
  owner: dict[str, str] = {}
  for job in jobs:
    if owner.setdefault(job.workdir, job.arm) != job.arm:
      raise UserError(f"arms '{owner[job.workdir]}' and '{job.arm}' are the same runs: their configs differ "
                      "in nothing that a result depends on; change one or leave it out")
    both = f"arms '{jobs[0].arm}' and '{job.arm}'"
    if job.recipe["data"] != jobs[0].recipe["data"]:
      raise UserError(f"{both} have different data, {jobs[0].recipe['data']} and {job.recipe['data']}: their "
                      "losses do not compare; give both one data.source")
    a, b = (task_of(c).measure() for c in (jobs[0].config, job.config))
    if a != b:
      raise UserError(f"{both} are evaluated differently, '{a}' and '{b}': their losses do not compare; give "
                      "both one data.length, data.objective and eval.min_bytes")
  return jobs
