"""LIMoE's claim: with balance losses alone a rare modality falls on few experts, with entropies it does not.

Trains the config on generated pairs of an image and its caption, on paired seeds, everything else being
equal: with both entropies of each modality (the paper's), with none of them (classic), with the text's local
one alone (local). Then it looks at what image and text tokens do in each sparse layer. Runs and their figures
are kept in --out: the same command goes on.
"""

import json
import os
import sys
from collections.abc import Sequence

from experiments import command
from sparse_experts import storage

ARMS = {"entropies": "", "classic": ":classic", "local": ":local"}  # name -> variant of the config
FULL, QUICK = dict(steps=None, seeds=3), dict(steps=60, seeds=2)  # None: the config's


def main(argv: Sequence[str]) -> int:
  parser = command.parser("limoe", __doc__)
  parser.add_argument("--quick", action="store_true", help="two seeds of 60 steps")
  parser.add_argument("--config", metavar="FILE", default="experiments/limoe/config.py")
  parser.add_argument("--out", metavar="DIR", default="runs/limoe")
  return command.main(parser, run, argv)


def run(args) -> None:
  from experiments.limoe import report
  from sparse_experts.config import load_config
  from sparse_experts.report import plots

  size = QUICK if args.quick else FULL
  configs = {arm: load_config(args.config + variant).unlock() for arm, variant in ARMS.items()}
  for config in configs.values():
    if size["steps"]:
      config.train.steps = config.train.eval_every = config.train.checkpoint_every = size["steps"]
  steps, rows = config.train.steps, config.train.batch_size
  print(f"{len(ARMS)} arms x {size['seeds']} seeds: {len(ARMS) * size['seeds']} runs of {steps} steps of "
        f"{rows} pairs; what is done is kept in {args.out}", flush=True)
  found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
  for seed in range(size["seeds"]):
    for arm, config in configs.items():
      config.train.seed = seed
      found[arm].append(figures(config, os.path.join(args.out, f"{arm}_{seed}")))
      print(f"seed {seed}, {arm}: {report.in_words(found[arm][-1])}", flush=True)
  storage.write(os.path.join(args.out, "results.json"), json.dumps(found, indent=1))
  print(report.table(found))
  plots.save(report.draw(found), os.path.join(args.out, "picture.png"))


def figures(config, workdir: str) -> dict[str, float]:
  """Of the run in that folder, trained and measured now unless it is there."""
  from experiments.limoe.measure import measure
  from sparse_experts.training import workdir as wd
  from sparse_experts.training.loop import train
  from sparse_experts.training.run import with_given

  path = os.path.join(workdir, "figures.json")
  if not os.path.exists(path):
    trained = train(config, workdir)
    if trained.step < config.train.steps:  # SIGTERM: saved and left
      raise KeyboardInterrupt
    storage.write(path, json.dumps(measure(trained), indent=1))
  wd.claim(workdir, with_given(config, None, None))  # refuses figures of another config
  with open(path, encoding="utf-8") as f:
    return json.load(f)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
