"""The synthetic table of "Towards Understanding Mixture of Experts in Deep Learning" (Chen et al. 2022).

Settings 1 to 4: a mixture of 8 experts, linear and cubic, against one network as wide as all of them.
Runs that are done are kept in --out: after a kill the same command goes on.
"""

import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures

from experiments import command
from experiments.understanding_moe import picture, report
from experiments.understanding_moe.kept import Job, Kept
from sparse_experts import storage
from sparse_experts.report import plots

MODELS = ("single linear", "single cubic", "mixture linear", "mixture cubic")
FULL = dict(examples=16_000, runs={"single": 3, "mixture": 10})
QUICK = dict(examples=4_000, runs={"single": 2, "mixture": 2})
AT_ONCE = 2  # runs: one is small and keeps one core busy
# Seconds of a run with 16,000 examples on two busy cores, for the estimate before any run is measured.
SECONDS = {"single linear": 6, "single cubic": 70, "mixture linear": 13, "mixture cubic": 39}


def main(argv: Sequence[str]) -> int:
  """Its exit code is 1 where a check does not hold."""
  parser = command.parser("understanding_moe", __doc__)
  parser.add_argument("--quick", action="store_true", help="a quarter of the data, two runs of each")
  parser.add_argument("--gate", choices=("raw", "softmax"), default="raw",
                      help="raw, as the published table was made, or softmax, as the paper defines it")
  parser.add_argument("--out", metavar="DIR", help="default: runs/understanding_moe and what was asked for")
  return command.main(parser, reproduce, argv)


def reproduce(args) -> int:
  started = time.monotonic()
  if args.out is None:
    asked = ["quick"] * args.quick + [args.gate] * (args.gate != "raw")
    args.out = "_".join([os.path.join("runs", "understanding_moe"), *asked])
  size = QUICK if args.quick else FULL
  kept = Kept(args.out, {"examples": size["examples"], "gate": args.gate})
  jobs = [Job(setting, model, seed) for setting in (1, 2, 3, 4) for model in MODELS
          for seed in range(size["runs"][model.split()[0]])]
  left = [job for job in jobs if job not in kept.runs]
  say = lambda text: print(text, flush=True)
  say(f"{len(jobs)} runs, {len(jobs) - len(left)} of them done; about {estimate(left, kept)} on two cores")
  for job, figures in run_all(left, size["examples"], args.gate):
    kept.add(job, figures)
    left.remove(job)
    say(f"[{len(jobs) - len(left)}/{len(jobs)}] setting {job.setting}, {job.model}, seed {job.seed}: "
        + in_words(figures) + f"; {estimate(left, kept)} left")

  found = report.summary(kept.runs[job] for job in jobs)
  made = report.checks(found, args.quick)
  seconds = round(sum(r["seconds"] for r in kept.runs.values()), 1)
  kept.write(machine=machine(), seconds_of_runs=seconds, checks=made, summary=found)
  plots.save(picture.draw(kept.runs.values()), os.path.join(args.out, "picture.png"))
  table = report.table(found)
  storage.write(os.path.join(args.out, "table.md"), table + "\n")
  say(f"\n{table}\n\n{report.in_words(made)}\n")
  minutes = (time.monotonic() - started) / 60
  say(f"results.json, table.md and picture.png are in {args.out}; {minutes:.1f} minutes this time")
  return 0 if all(c["holds"] for c in made) else 1


def run_all(jobs: Sequence[Job], examples: int, gate: str) -> Iterator[tuple[Job, dict]]:
  """Each job and its figures as it ends, AT_ONCE of them at a time."""
  pool = futures.ThreadPoolExecutor(AT_ONCE)
  try:
    running = {pool.submit(run, job, examples, gate): job for job in jobs}
    for done in futures.as_completed(running):
      yield running[done], done.result()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def run(job: Job, examples: int, gate: str) -> dict:
  """The figures of one run; the first of a kind also compiles."""
  import jax  # after the arguments were understood: a mistake answers at once

  from experiments.understanding_moe import data, train
  from experiments.understanding_moe.entropy import dispatch_entropy

  started = time.monotonic()
  training, test = data.examples(data.SETTINGS[job.setting], examples)
  family, activation = job.model.split()
  key = jax.random.key(job.seed)
  if family == "single":
    outcome = train.run_single(key, training, test, activation=activation)
  else:
    outcome = train.run_mixture(key, training, test, activation=activation, gate=gate)
  loss, sent = float(outcome.loss), outcome.expert_N
  return {
      "steps": int(outcome.steps),
      "loss": loss if math.isfinite(loss) else None,
      "accuracy": float(outcome.accuracy),
      "accuracy_no_noise": float(outcome.accuracy_no_noise),
      "entropy": None if sent is None else dispatch_entropy(training.cluster_N, sent),
      "seconds": round(time.monotonic() - started, 2)}


def in_words(figures: dict) -> str:
  loss = "not finite" if figures["loss"] is None else f"{figures['loss']:.4f}"
  text = f"{figures['steps']} steps, loss {loss}, accuracy {figures['accuracy']:.2%}"
  if figures["entropy"] is not None:
    text += f" ({figures['accuracy_no_noise']:.2%} without noise), entropy {figures['entropy']:.3f}"
  return text + f", {figures['seconds']:.0f} s"


def estimate(left: Sequence[Job], kept: Kept) -> str:
  """Minutes that the runs will take, by the mean of those of their model that are done."""
  seconds = 0.0
  for job in left:
    done = [r["seconds"] for j, r in kept.runs.items() if j.model == job.model]
    guess = SECONDS[job.model] * kept.asked["examples"] / FULL["examples"]
    seconds += sum(done) / len(done) if done else guess
  return f"{seconds / AT_ONCE / 60:.1f} minutes"


def machine() -> dict:
  from importlib import metadata

  import jax

  return {"python": platform.python_version(), "jax": jax.__version__, "flax": metadata.version("flax"),
          "device": jax.devices()[0].platform, "cores": os.cpu_count()}


if __name__ == "__main__":
  # A run takes no more threads than its own; jax reads this when it is imported.
  os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
  code = main(sys.argv[1:])
  sys.stdout.flush()
  os._exit(code)  # at a normal exit Python waits for threads whose runs nobody wants any more
