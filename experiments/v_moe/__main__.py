"""V-MoE's claims on one trained model: capacity and batch priority, experts and classes, few-shot, upcycling.

PART: capacity (accuracy and nats against slots, with and without batch priority), classes (mutual
information of expert and class by layer, less that of permuted classes), few_shot (transfer to --images,
beside raw pixels and an untrained model), upcycling (a dense run grown sparse against a sparse one from
scratch, equal extra steps, paired seeds), or all. What is done is kept in --out: the same command goes on.
The trained model is one of --config, or that of --run, a folder of a run trained elsewhere.
"""

import json
import os
import sys
import time
from collections.abc import Sequence

from experiments import command
from sparse_experts import storage
from sparse_experts.errors import UserError, nearest

FULL = dict(steps=600, more=300, seeds=5, capacities=tuple(n / 10 for n in range(1, 11)), permutations=100)
QUICK = dict(steps=200, more=100, seeds=1, capacities=(0.25, 0.5, 1.0), permutations=20)


class Kept:
  """results.json: figures by name, written after each; `of` says of what they are."""

  def __init__(self, out: str, of: dict):
    os.makedirs(out, exist_ok=True)
    self.out, self._path = out, os.path.join(out, "results.json")
    self.found = {"of": of}
    if os.path.exists(self._path):
      with open(self._path, encoding="utf-8") as f:
        self.found = json.load(f)
    for flag, value in self.found["of"].items():
      if value != of[flag]:
        raise UserError(f"--out={out} holds results of --{flag}={value}, not {of[flag]}; choose another "
                        "folder")

  def get(self, name: str, make) -> dict:
    """Figures of that name, made now unless they are kept."""
    if name not in self.found:
      started = time.monotonic()
      self.found[name] = make() | {"seconds": round(time.monotonic() - started, 1)}
      storage.write(self._path, json.dumps(self.found, indent=1))
    print(f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                  for k, v in self.found[name].items()), flush=True)
    return self.found[name]


def main(argv: Sequence[str]) -> int:
  parser = command.parser("v_moe", __doc__)
  parser.add_argument("part", metavar="PART", nargs="?", default="all")
  parser.add_argument("--quick", action="store_true", help="one short run of each, few capacities")
  parser.add_argument("--config", metavar="FILE", default="configs/v_moe/digits.py")
  parser.add_argument("--run", metavar="DIR", help="a trained run, in place of one of --config")
  parser.add_argument("--images", metavar="SOURCE", help="of few_shot, such as files:PATH; default: left out")
  parser.add_argument("--out", metavar="DIR", default="runs/v_moe")
  return command.main(parser, run, argv)


def run(args) -> None:
  if args.part not in (*PARTS, "all"):
    raise UserError(f"part '{args.part}' is unknown{nearest(args.part, (*PARTS, 'all'))}")
  size, parts = QUICK if args.quick else FULL, PARTS if args.part == "all" else (args.part,)
  if args.run and "upcycling" in parts:
    raise UserError(f"--run={args.run} is one model, upcycling trains many; name another part, or leave out "
                    "--run")
  runs = num_runs(parts, args.run, size["seeds"])
  programs = ("capacity" in parts) * 2 * len(size["capacities"])
  most = " at most" * ("upcycling" in parts)
  print(f"{', '.join(parts)}: {runs} runs of{most} {size['steps']} steps, {programs} evaluations that "
        f"compile; what is done is kept in {args.out}", flush=True)
  kept = Kept(args.out, {"quick": args.quick, "config": args.config, "run": args.run})
  from experiments.v_moe import parts as made  # now that the arguments were understood

  for part in parts:
    getattr(made, part)(args, size, kept)


def num_runs(parts: Sequence[str], given: str | None, seeds: int) -> int:
  """How many models `parts` train; `given`: the one of --run, if any."""
  looked_at = not {"capacity", "few_shot"}.isdisjoint(parts)  # one model for both
  return (not given) * (looked_at + ("classes" in parts)) + ("upcycling" in parts) * 4 * seeds


PARTS = ("capacity", "classes", "few_shot", "upcycling")

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
