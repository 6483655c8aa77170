"""Trains a config in a work directory; run again on the same directory, it resumes.

Example: python -m sparse_experts train --config=configs/smoke.py --workdir=runs/smoke
"""

from sparse_experts.cli import flags
from sparse_experts.errors import Stopped


def add_flags(parser):
  flags.add_config(parser)
  flags.add_workdir(parser, "folder for config.json, metrics.jsonl, checkpoints/ and tensorboard/")
  parser.add_argument("--profile", metavar="STEPS", type=flags.at_least(1), default=0,
                      help="record so many steps: a trace in DIR/profile, and a table of where the time goes")
  parser.add_argument("--watch", action="store_true",
                      help="on a terminal: a view that redraws, with the load of each expert")
  parser.add_argument("--stopped_code", metavar="N", type=flags.at_least(0), default=0,
                      help="exit code after SIGTERM or SIGHUP, once the run is saved; default 0, which a job "
                      "of Kubernetes takes for finished: 143 there")


def run(args):
  config = flags.read_config(args)
  workdir = flags.need(args, "workdir", "runs/smoke")
  from sparse_experts.training.loop import train

  try:
    train(config, workdir, profile=args.profile, watch=args.watch, notes=args.notes)
  except Stopped:  # it is saved
    return args.stopped_code
  return 0
