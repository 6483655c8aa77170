"""The ledger of published claims: lists them, shows one, or runs one and judges it.

Example: python -m sparse_experts claim run scaling_laws/cutoffs --scale=cpu --data=DIR

claim list           every claim with what was published, what we found, and the verdict
claim show NAME      what was fixed before the first run, and every result
claim pilot NAME     trains seeds of its own, and tells how many seeds the claim needs
claim run NAME       trains what is missing, judges by the rule that was fixed, and appends the result

NAME is a file experiments/PAPER/CLAIM.json, written PAPER/CLAIM. 'PAPER/*' runs or pilots all claims that
match and have no result at the scale yet, controls first. A run that was stopped goes on with the same
command.
"""

import functools
import time

from sparse_experts import storage
from sparse_experts.cli import flags
from sparse_experts.errors import UserError

ACTIONS = ("list", "show", "pilot", "run")
EXAMPLE = "switch/more_experts"
STOPPED = "stopped; the same command resumes from here"


def add_flags(parser):
  parser.epilog = None  # it takes no overrides
  parser.add_argument("what", metavar="list|show|pilot|run", nargs="*",
                      help="list; show NAME; pilot NAME; run NAME")
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
    raise UserError(f"claim {action} is unknown; write claim list, or claim show NAME, claim "
                    "pilot NAME, claim run NAME")
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
    chosen = claim_file.chosen(claims, names[0], args.scale)
    if action == "pilot" and len(chosen) > 1:
      chosen = [claim for claim in chosen if claim.paired]
    for i, claim in enumerate(chosen):
      if len(chosen) > 1:
        print(f"{i + 1} of {len(chosen)}: {claim.name}, {claim.fixed['scales'][args.scale]['minutes']:g} "
              "minutes planned", flush=True)
      text = _pilot(args, claim) if action == "pilot" else _run(args, claim, claim_file.ledger(args.ledger))
      print(text, flush=True)
      if text == STOPPED:
        return


def _run(args, claim, claims) -> str:
  """What to print of a claim that was run."""
  from sparse_experts.ledger import claim_file, run, table

  started = time.monotonic()
  run.check_scale(claim, args.scale)
  if not args.quick:
    claim_file.check_committed(claim)
    claim_file.check_piloted(claim, args.scale)
  result = (_paired if claim.paired else _published)(args, claim, claims, started)
  if result is None:
    return STOPPED
  result = {"scale": args.scale, **result}
  if args.quick:
    return f"it runs: {run.keep_quick(args.runs, claim, result)}; --quick judges nothing"
  return table.details(claim_file.append(claim, result))


def _published(args, claim, claims, started):
  from sparse_experts.ledger import measures, run

  path, digest = measures.outside(claim, args.data)
  figures = measures.function(claim)(path, args.quick)
  return run.published(claim, figures) | run.about(started, digest, measures.code(claim))


def _pilot(args, claim) -> str:
  """What to print of a pilot."""
  from sparse_experts.ledger import measures, run

  if not claim.paired:
    raise UserError(f"claim {claim.name} is judged by published numbers, which need no pilot; run it")
  run.check_scale(claim, args.scale)
  figures, _ = _figures(args, claim, measures.code(claim), run.PILOT)
  return STOPPED if figures is None else run.pilot(claim, args.scale, figures)


def _paired(args, claim, claims, started):
  from sparse_experts.ledger import claim_file, measures, run

  control = None
  if name := claim.fixed.get("control"):
    passed = claim_file.find(claims, name).newest(args.scale)
    if passed is None and not args.quick:
      raise UserError("its positive control has no result at this scale; first: "
                      f"claim run {name} --scale={args.scale}")
    control = passed["verdict"] if passed else None
  code = measures.code(claim)
  figures, data = _figures(args, claim, code, run.QUICK if args.quick else run.COUNTED)
  if figures is None:
    return None
  return {"figures": figures, **run.judged(claim, figures, control), **run.about(started, data, code)}


def _figures(args, claim, code, purpose):
  """(figures of each arm and seed, the data's hash); None, "" if it was asked to stop."""
  from sparse_experts.ledger import measures, run

  say = lambda text: print(text, flush=True)
  if not claim.trained:
    measure, (path, digest) = measures.function(claim), measures.outside(claim, args.data)
    if path:
      measure = functools.partial(measure, path=path)
    return run.computed(claim, args.scale, measure, code, args.runs, purpose, say), digest
  if (jobs := _train(args, claim, purpose, say)) is None:
    return None, ""
  measure = measures.function(claim) if "measure" in claim.fixed else run.primary
  return run.figures_of(jobs, measure), run.check_one_data(jobs)


def _train(args, claim, purpose, say):
  """The finished runs; None if it was asked to stop."""
  from sparse_experts.cli.sweep import resolve
  from sparse_experts.ledger import run

  sweep = run.sweep_of(claim, args.scale, purpose)
  common = run.QUICK_OVERRIDES if purpose == run.QUICK else ()
  configs = {arm: resolve(arm, of, sweep, common) for arm, of in sweep.arms.items()}
  return run.train(sweep, configs, args.runs, say)
