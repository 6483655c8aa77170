"""Continues a prompt, or fills its masked spans, with a trained run; dropless, with a cache.

Example: python -m sparse_experts sample --workdir=runs/smoke --prompt='def main('

A decoder-only model continues the prompt. An encoder-decoder fills the spans marked <mask> in it:
--prompt='def area(r): return <mask> * r'
"""

from sparse_experts.cli import flags
from sparse_experts.config.keys_run import MOST_SEED
from sparse_experts.errors import UserError


def add_flags(parser):
  parser.epilog = None  # it takes no overrides
  flags.add_run(parser)
  parser.add_argument("--prompt", metavar="TEXT", help="text to continue, or with spans marked <mask>")
  parser.add_argument("--length", metavar="N", type=flags.at_least(1, 2**20), default=200,
                      help="most tokens to draw; default 200")
  parser.add_argument("--temperature", metavar="X", type=flags.at_least(0.0), default=0.7,
                      help="0 takes the likeliest token; default 0.7")
  parser.add_argument("--seed", metavar="N", type=flags.at_least(0, MOST_SEED), default=0,
                      help="of the draw; default 0")


def run(args):
  config = flags.read_run_config(args, may_change=())
  if args.prompt is None:
    raise UserError("sample needs --prompt; write for example --prompt='def main('")
  try:
    args.prompt.encode()
  except UnicodeEncodeError:  # bytes that the shell passed through
    raise UserError(f"--prompt={args.prompt!r} is not UTF-8; give text") from None
  from sparse_experts.training.run import load
  from sparse_experts.training.sample import sample

  loaded = load(args.workdir, args.step, config=flags.on_these_devices(args, config))
  print(sample(loaded, args.prompt, length=args.length, temperature=args.temperature, seed=args.seed))
