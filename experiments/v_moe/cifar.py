"""Dense, V-MoE and Soft MoE at equal FLOPs on one GPU, all runs at once: 3 arms x 5 seeds.

Each run is a process of its own, with its own core for its images. After --minutes those that still train are
asked to stop, save and evaluate, which takes up to 2 minutes more. --out then holds runs.json (steps, losses,
evaluations), images.npz (what each run makes of each validation image) and weights.tar.N, the V-MoE of seed 0
as a run that `load` reads, in parts: cat weights.tar.* | tar x. What has been written by then is there also
if the program is killed. `python -m experiments.v_moe.paired --out=DIR` compares the arms.
"""

import argparse
import contextlib
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

from sparse_experts import storage

CONFIG = "experiments/v_moe/config_cifar.py"
ARMS = {"dense": ":dense", "v_moe": "", "soft_moe": ":soft_moe"}
KEPT = ("v_moe", 0)  # the run whose weights are kept
PART = 15_000_000  # bytes of a part of them


def main() -> None:
  parser = argparse.ArgumentParser(
      prog="python -m experiments.v_moe.cifar", description=inspect.getdoc(sys.modules[__name__]),
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--images", required=True, metavar="SOURCE", help="such as files:PATH")
  parser.add_argument("--steps", type=int, default=20_000)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--processes", type=int, default=15, help="runs at once")
  parser.add_argument("--minutes", type=float, default=float("inf"))
  parser.add_argument("--workdir", metavar="DIR", default="runs/v_moe_cifar")
  parser.add_argument("--out", metavar="DIR", default="runs/v_moe_cifar")
  parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="trains this run alone")
  args = parser.parse_args()
  if args.one:
    one(args, args.one[0], int(args.one[1]))
  else:
    all_runs(args)


def folder(args, arm: str, seed: int) -> str:
  return os.path.join(args.workdir, f"{arm}_{seed}")


def config_of(args, arm: str, seed: int):
  """The recipe was fixed before any run: 5% of the steps warm up."""
  from sparse_experts.config import load_config

  config = load_config(CONFIG + ARMS[arm]).unlock()
  config.data.source = args.images
  train, steps = config.train, args.steps
  train.seed, train.steps, train.keep_checkpoints = seed, steps, 1
  train.log_every, train.eval_every, train.checkpoint_every = max(steps // 50, 1), max(steps // 5, 1), steps
  config.optimizer.warmup_steps = max(steps // 20, 1)
  return config.lock()


def one(args, arm: str, seed: int) -> None:
  """Trains, unless it is asked to stop before, then looks at each validation image."""
  import numpy as np

  from sparse_experts.training import loop

  where = folder(args, arm, seed)
  run = loop.train(config_of(args, arm, seed), where)
  found = {"step": run.step}
  for kind in ("dropless", "eval_capacity") if arm == "v_moe" else ("dropless",):
    found |= {f"{name}/{kind}": x for name, x in look(run, kind).items()}
  with storage.create(os.path.join(where, "images.npz")) as f:
    np.savez(f, **found)
  if (arm, seed) == KEPT:
    keep_weights(run, where)


def look(run, kind: str) -> dict:
  """Nats, the class guessed and the true one of every validation image, in their frozen order."""
  import jax
  import numpy as np

  from sparse_experts import partitioning
  from sparse_experts.data.feed import eval_batches
  from sparse_experts.tasks import task_of
  from sparse_experts.training.evaluate import batch_rows

  dataset, model, task = run.dataset("valid"), run.abstract_model(kind), task_of(run.config)
  sharding, found = partitioning.batch_sharding(run.mesh), []
  with partitioning.use(run.mesh):
    for batch in eval_batches(dataset, batch_rows(model, run.config, run.mesh, dataset), sharding):
      logits, _ = run.model(batch, kind=kind)
      nats = task.losses(logits, batch["targets"], batch["shares"])
      found.append(jax.device_get((nats, logits.argmax(-1), batch["targets"][:, 0])))
  nats, guess, label = (np.concatenate(parts)[:len(dataset)] for parts in zip(*found))
  return dict(nats=nats.astype(np.float32), guess=guess.astype(np.uint8), label=label.astype(np.uint8))


def keep_weights(run, where: str) -> None:
  """The run without its optimizer's state, as WHERE/weights.tar."""
  import numpy as np

  from sparse_experts.config import to_json
  from sparse_experts.training import workdir as wd
  from sparse_experts.training.checkpoints import Checkpoints
  from sparse_experts.training.state import TrainState

  light = os.path.join(where, "weights")
  os.makedirs(light, exist_ok=True)
  wd.keep(light, run.config, run.tokenizer)
  with Checkpoints(wd.checkpoints(light), 1) as checkpoints:
    checkpoints.save(TrainState(np.int32(run.step), run.params, run.buffers, {}),
                     {"config": to_json(run.config), "data_fingerprint": run.data_fingerprint})
  with storage.create(os.path.join(where, "weights.tar")) as f, tarfile.open(fileobj=f, mode="w") as tar:
    tar.add(light, "weights")


def all_runs(args) -> None:
  begun = time.monotonic()
  jobs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
  left, running, codes, told = list(jobs), {}, {}, 0.0
  stopped = False
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
  with contextlib.ExitStack() as stack:
    stack.callback(lambda: [p.kill() for p in running.values() if p.poll() is None])
    while left or running:
      while left and len(running) < args.processes and not stopped:
        job = left.pop(0)
        running[job] = start(args, *job)
      time.sleep(0.5)
      for job in [job for job, process in running.items() if process.poll() is not None]:
        codes[job] = running.pop(job).returncode
      minutes = (time.monotonic() - begun) / 60
      if minutes > args.minutes and not stopped:
        stopped, left = True, []
        for process in running.values():
          process.terminate()
      if minutes > args.minutes + 2:  # they had time to evaluate
        break
      if minutes - told > 0.25 or not (left or running):
        told = minutes
        print(f"{minutes:.1f} minutes: {progress(gather(args, jobs, codes))}", flush=True)
  print(f"{(time.monotonic() - begun) / 60:.1f} minutes: {progress(gather(args, jobs, codes))}")


def start(args, arm: str, seed: int) -> subprocess.Popen:
  """A run in its own process, which takes memory of the GPU as it needs it."""
  where = folder(args, arm, seed)
  os.makedirs(where, exist_ok=True)
  command = [sys.executable, "-m", "experiments.v_moe.cifar", f"--images={args.images}",
             f"--steps={args.steps}", f"--workdir={args.workdir}", "--one", arm, str(seed)]
  environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": "1",
                              "OPENBLAS_NUM_THREADS": "1"}
  with open(os.path.join(where, "log.txt"), "ab") as log:
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def gather(args, jobs, codes) -> dict:
  """Writes what is there of all runs into --out, and returns what runs.json holds."""
  import numpy as np

  os.makedirs(args.out, exist_ok=True)
  runs, images = {}, {}
  for arm, seed in jobs:
    where, name = folder(args, arm, seed), f"{arm}/{seed}"
    rows = read_rows(os.path.join(where, "metrics.jsonl"))
    seconds = sorted(row["seconds_per_step"] for row in rows if "seconds_per_step" in row)
    runs[name] = {
        "code": codes.get((arm, seed)), "step": rows[-1]["step"] if rows else 0,
        "seconds_per_step": seconds[len(seconds) // 2] if seconds else None,
        "train": [[row["step"], row["loss"]] for row in rows if "loss" in row],
        "valid": [[row["step"], row["eval/accuracy"], row["eval/nats_per_image"]]
                  for row in rows if "eval/accuracy" in row],
        "last": rows[-1] if rows else {}, "log": tail(os.path.join(where, "log.txt"))}
    with contextlib.suppress(OSError, ValueError), np.load(os.path.join(where, "images.npz")) as found:
      images |= {f"{name}/{key}": found[key] for key in found}
  storage.write(os.path.join(args.out, "runs.json"),
                json.dumps({"steps": args.steps, "runs": runs}, indent=1))
  if images:
    with storage.create(os.path.join(args.out, "images.npz")) as f:
      np.savez_compressed(f, **images)
  with contextlib.suppress(OSError), open(os.path.join(folder(args, *KEPT), "weights.tar"), "rb") as f:
    for i, part in enumerate(iter(lambda: f.read(PART), b"")):
      storage.write(os.path.join(args.out, f"weights.tar.{i}"), part)
  return runs


def read_rows(path: str) -> list[dict]:
  try:
    with open(path, encoding="utf-8") as f:
      return [json.loads(line) for line in f if line.endswith("\n")]
  except OSError:
    return []


def tail(path: str, size: int = 1500) -> str:
  try:
    with open(path, "rb") as f:
      f.seek(max(f.seek(0, io.SEEK_END) - size, 0))
      return f.read().decode(errors="replace")
  except OSError:
    return ""


def progress(runs: dict) -> str:
  """Of each arm: the fewest and most steps done, the slowest step, how many runs ended and how many well."""
  words = []
  for arm in ARMS:
    of = [run for name, run in runs.items() if name.startswith(arm + "/")]
    steps, seconds = [run["step"] for run in of], [run["seconds_per_step"] or 0 for run in of]
    codes = [run["code"] for run in of if run["code"] is not None]
    words.append(f"{arm} step {min(steps)}-{max(steps)}, {1000 * max(seconds):.0f} ms, {len(codes)} ended, "
                 f"{codes.count(0)} well")
  return "; ".join(words)


if __name__ == "__main__":
  main()
