"""Writes one self-contained HTML page about a run, several runs or a sweep; it opens offline.

Example: python -m sparse_experts report --workdir=runs/smoke
The page shows losses and speed, the balance of every sparse layer over time, what each expert takes, and the
config; for a run that is finished or going on. Several folders are drawn together, with paired differences:
--workdir=DIR DIR2. What needs the model is measured once per checkpoint and kept in DIR/report_cache.
--ledger=experiments writes the ledger of claims instead: verdicts, intervals and every figure.
"""

import argparse
import os
import shlex

from sparse_experts import storage, terminal
from sparse_experts.cli import flags
from sparse_experts.cli.tables import short
from sparse_experts.config import check_workdir
from sparse_experts.errors import UserError

NAME, LEDGER = "report.html", "ledger.html"


def add_flags(parser):
  parser.epilog = None  # it takes no overrides, but that a name of code is repeated
  parser.add_argument("--workdir", metavar="DIR",
                      help="a run, a folder of runs of several seeds, or a sweep's result")
  parser.add_argument("more", metavar="DIR2", nargs="*", help="more of them, drawn together with the first")
  parser.add_argument("--sweep", metavar="RUNS/sweeps/NAME", help="a sweep's result, instead of --workdir")
  parser.add_argument("--ledger", metavar="DIR", help="folder of claims, instead of --workdir")
  parser.add_argument("--out", metavar="FILE", help=f"default: DIR/{NAME}; of several folders {NAME}, here")
  parser.add_argument("--no-model", action="store_true",
                      help="leave out what needs the model: cards, regret, rerouting cost, layer table")


def run(args):
  (_ledger if args.ledger else _runs)(args)


def _runs(args):
  sweep, paths = _what(args)
  if sweep or not args.overrides:
    flags.may_only_change(args, (), "report reads what was trained and scored")
  else:
    for path in paths:
      flags.read_run_config(argparse.Namespace(**vars(args) | {"workdir": path}), ())
  out = _check_out(args.out or (os.path.join(sweep or paths[0], NAME) if len(paths) < 2 else NAME))

  from sparse_experts.report import blob, page

  made = blob.make(paths, None if args.no_model or sweep else _cards, _say, sweep)
  storage.write(out, page.render(made))
  print(f"{out}: {short(storage.facts(out).size)}B, {len(made['runs'])} run{'s' * (len(made['runs']) != 1)}")


def _ledger(args):
  from sparse_experts.ledger import claim_file, table
  from sparse_experts.report import ledger

  if args.workdir or args.more or args.sweep or args.no_model:
    raise UserError(f"--ledger={args.ledger} makes a page of claims; leave --workdir, --sweep and "
                    "--no-model out")
  flags.may_only_change(args, (), "a claim's arms are fixed in its file")
  out = _check_out(args.out or LEDGER)
  claims = claim_file.ledger(args.ledger)
  papers: dict[str, dict] = {}
  for claim in claims.values():
    scale, result = next(iter(claim.newest_of_each.items()), ("", None))
    found = "" if result is None else table.ours(claim, result)
    paper = papers.setdefault(name := claim.name.partition("/")[0], {
        "name": name, "paper": claim.fixed["paper"], "claims": []})
    paper["claims"].append(ledger.claim(
        claim.name, claim.fixed, result, table.said(claim, result, scale), found,
        [*table.facts(claim.fixed), *table.facts(result or {})]))
  storage.write(out, ledger.render(list(papers.values()), table.summary(claims)))
  print(f"{out}: {short(storage.facts(out).size)}B, {len(claims)} claims")


def _what(args):
  """(the sweep's folder or None, folders of runs)."""
  if args.sweep:
    if args.workdir or args.more:
      raise UserError(f"--sweep={args.sweep} and --workdir are both given; leave one of them out")
    from sparse_experts.report import groups

    groups.sweep_arms(args.sweep)  # which names a sweep that is not there
    return args.sweep, []
  if args.more and not args.workdir:
    call = " ".join(map(shlex.quote, args.more))
    raise UserError(f"report takes the first folder by --workdir; write report --workdir={call}")
  paths = [flags.need(args, "workdir", "runs/smoke"), *args.more]
  for path in paths:
    check_workdir(path)
    if not storage.is_folder(path):
      what = "is a file" if storage.exists(path) else "does not exist"
      parts = path.split(",")
      way_out = (f"write several with spaces, --workdir={' '.join(map(shlex.quote, parts))}"
                 if len(parts) > 1 and all(map(os.path.isdir, parts)) else
                 "name the folder of a run or of a sweep's result")
      raise UserError(f"workdir {path} {what}; {way_out}")
  from sparse_experts.report import groups

  if len(paths) == 1 and groups.is_sweep(paths[0]):
    return paths[0], []
  return None, paths


def _check_out(path):
  storage.check_out(path, f"--out={path}")
  return path


def _cards(workdir):
  from sparse_experts.report import cards

  return cards.cards(workdir, say=_say)


def _say(text):
  terminal.tell(text)
