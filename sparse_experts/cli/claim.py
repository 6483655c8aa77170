"""The ledger of published claims: lists them, shows one, or runs one and judges it.

Example: python -m sparse_experts claim run scaling_laws/cutoffs --scale=cpu --data=DIR

claim list           every claim with what was published, what we found, and the verdict
claim show NAME      what was fixed before the first run, and every result
claim run NAME       trains what is missing, judges by the rule that was fixed, and appends the result

NAME is a file experiments/PAPER/CLAIM.json, written PAPER/CLAIM. A run that was stopped goes on with the same
command.
"""

import time

from sparse_experts import storage
from sparse_experts.cli import flags
from sparse_experts.errors import UserError

ACTIONS = ("list", "show", "run")
EXAMPLE = "switch/more_experts"


def add_flags(parser):
  parser.epilog = None  # it takes no overrides
  parser.add_argument("what", metavar="list|show|run", nargs="*", help="list; show NAME; run NAME")
  parser.add_argument("--ledger", metavar="DIR", default="experiments",
                      help="folder of the claims; default experiments")
  parser.add_argument("--scale", metavar="cpu|gpu|tpu", default="cpu",
                      help="run: which of the claim's plans; default cpu")
  parser.add_argument("--runs", metavar="DIR", default="runs",
                      help="run: folder of the trained runs; default runs")
  parser.add_argument("--data", metavar="DIR", help="run: the outside data that a claim names")
  parser.add_argument("--quick", action="store_true", help="run: shows only that it runs; no result is kept")
  parser.add_argument("--out", metavar="FILE", help="list: write the table there as Markdown")


def run(args):
  flags.may_only_change(args, (), "a claim's arms are fixed in its file")
  action, *names = args.what or ["list"]
  if action not in ACTIONS:
    raise UserError(f"claim {action} is unknown; write claim list, claim show NAME or claim run NAME")
  if len(names) != (action != "list"):
    wanted, example = ("no name", "") if action == "list" else ("one name", f" {EXAMPLE}")
    raise UserError(f"claim {action} takes {wanted}, got {len(names)}; write for example "
                    f"claim {action}{example}")
  from sparse_experts.ledger import claim_file, table

  flags.one_of("scale", args.scale, claim_file.SCALES)
  claims = claim_file.ledger(args.ledger)
  if action == "list":
    text = table.markdown(claims)
    if args.out:
      storage.write(args.out, text + "\n")
    print(text)
  elif action == "show":
    print(table.details(claim_file.find(claims, names[0])))
  else:
    print(_run(args, claim_file.find(claims, names[0]), claims))


def _run(args, claim, claims) -> str:
  """What to print of a claim that was run."""
  from sparse_experts.ledger import claim_file, run, table

  started = time.monotonic()
  run.check_scale(claim, args.scale)
  if not args.quick:
    claim_file.check_committed(claim)
  result = (_paired if claim.paired else _published)(args, claim, claims, started)
  if result is None:
    return "stopped; the same command resumes from here"
  result = {"scale": args.scale, **result}
  if args.quick:
    return f"it runs: {run.keep_quick(args.runs, claim, result)}; --quick judges nothing"
  return table.details(claim_file.append(claim, result))


def _published(args, claim, claims, started):
  from sparse_experts.ledger import measures, run

  path, digest = measures.outside(claim, args.data)
  figures = measures.function(claim)(path, args.quick)
  return run.published(claim, figures) | run.about(started, digest, measures.code(claim))


def _paired(args, claim, claims, started):
  from sparse_experts.ledger import claim_file, measures, run

  control, say = None, lambda text: print(text, flush=True)
  if name := claim.fixed.get("control"):
    passed = claim_file.find(claims, name).newest(args.scale)
    if passed is None and not args.quick:
      raise UserError("its positive control has no result at this scale; first: "
                      f"claim run {name} --scale={args.scale}")
    control = passed["verdict"] if passed else None
  code = measures.code(claim)
  if claim.trained:
    if (jobs := _train(args, claim, say)) is None:
      return None
    data = run.check_one_data(jobs)
    figures = run.figures_of(jobs, measures.function(claim) if "measure" in claim.fixed else run.primary)
  else:
    data = ""
    figures = run.computed(claim, args.scale, measures.function(claim), code, args.runs, args.quick, say)
  return {"figures": figures, **run.judged(claim, figures, control), **run.about(started, data, code)}


def _train(args, claim, say):
  """The finished runs; None if it was asked to stop."""
  from sparse_experts.cli.sweep import resolve
  from sparse_experts.ledger import run

  sweep = run.sweep_of(claim, args.scale, args.quick)
  common = run.QUICK if args.quick else ()
  configs = {arm: resolve(arm, of, sweep, common) for arm, of in sweep.arms.items()}
  return run.train(sweep, configs, args.runs, say)
