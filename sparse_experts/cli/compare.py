"""Compares two groups of runs over the same seeds: means, standard deviations, paired 95% interval.

Example: python -m sparse_experts compare runs/sweeps/sparse_vs_dense/switch runs/sweeps/sparse_vs_dense/dense

DIR_A and DIR_B are each a run, a folder of runs of several seeds, or an arm of a sweep
(runs/sweeps/NAME/ARM). Runs that were evaluated on different data or metrics are refused.
"""

from sparse_experts.cli import flags
from sparse_experts.errors import UserError


def add_flags(parser):
  parser.epilog = None  # it takes no overrides
  parser.add_argument("folders", metavar="DIR", nargs="*", help="DIR_A DIR_B; the difference is A minus B")
  flags.add_json(parser)
  parser.add_argument("--out", metavar="PNG", help="draw final figures, losses and paired differences")


def run(args):
  if len(args.folders) != 2:
    raise UserError(f"compare needs two folders, got {len(args.folders)}; write for example compare "
                    "runs/sweeps/sparse_vs_dense/switch runs/sweeps/sparse_vs_dense/dense")
  flags.may_only_change(args, (), "compare reads what was trained and scored")
  if args.out is not None and not args.out.endswith(".png"):
    raise UserError(f"--out={args.out} is drawn as a PNG; name a .png file")
  from sparse_experts.analysis import compare

  a, b = groups = [compare.read_group(folder) for folder in args.folders]
  compare.check(groups)
  compare.check_pairs(a, b)
  print(compare.report(a, b))
  if args.out:
    from sparse_experts.report import pictures, plots

    plots.save(pictures.compared(a, b), args.out)
  flags.print_json(args, compare.as_json(a, b))
