"""Scores a run on the frozen list of validation windows or images: nats per byte or image, dropless.

Beside it: the loss at the evaluation capacity, and rerouting cost, the rise of the loss when every token
goes to random experts instead of its own. Overrides may name other data, another mesh, other capacities
or who claims a slot first, say --config.model.eval_capacity_factor=0.5
--config.model.router.order=batch_priority.
"""

import json

from sparse_experts.cli import flags

ROUTING = ("capacity_factor", "eval_capacity_factor", "capacity_rule", "min_capacity", "group_size",
           "dispatch", "router.order")
MAY_CHANGE = ("data.source", "data.dir", "eval.", "mesh.", "model.exchange_rows_factor",
              *(prefix + name for prefix in ("model.", "model.decoder.") for name in ROUTING))


def add_flags(parser):
  flags.add_run(parser)
  parser.add_argument("--json", action="store_true", help="last line of the output is one JSON object")


def run(args):
  config = flags.read_run_config(args, MAY_CHANGE)
  from sparse_experts.train.evaluate import evaluate, in_words
  from sparse_experts.train.run import load

  loaded = load(args.workdir, args.step, config=config)
  print(f"{args.workdir} at step {loaded.step}")
  numbers = evaluate(loaded)
  print(in_words(numbers))
  if args.json:
    print(json.dumps(numbers))
