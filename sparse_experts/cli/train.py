"""Trains a config in a work directory; run again on the same directory, it resumes.

Example: python -m sparse_experts train --config=configs/smoke.py --workdir=runs/smoke
"""

from sparse_experts.cli import flags


def add_flags(parser):
  flags.add_config(parser)
  flags.add_workdir(parser, "folder for config.json, metrics.jsonl, checkpoints/ and tensorboard/")


def run(args):
  config = flags.read_config(args)
  workdir = flags.need(args, "workdir", "runs/smoke")
  from sparse_experts.train.loop import train

  train(config, workdir)
