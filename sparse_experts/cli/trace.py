"""Writes the routing of each token of a fixed set of records, as flat arrays for pandas.

Example: python -m sparse_experts trace --workdir=runs/smoke --out=trace.npz

OUT.npz holds one row per entry of the routers' lists (columns: `sparse_experts/analysis/trace.py`). OUT.json
records the run, steps, data and names of domains; OUT.png shows which domain goes to which experts; of images
OUT.patches.png draws the patches that each expert takes. Each expert's most typical tokens are printed, and
how far domain, position and class of a token tell its expert, next to untrained routers and to hashing.
The records are the first of the validation list, the same for every run on the same data. A run whose mesh
has more devices than there are here is loaded on those that are.
"""

import itertools
import os

from sparse_experts import storage
from sparse_experts.cli import flags
from sparse_experts.cli.tables import table
from sparse_experts.config import may_change
from sparse_experts.config.key import EVALUATE
from sparse_experts.errors import UserError

KINDS = ("dropless", "eval_capacity", "train")
MOST_EXPERTS = 16  # of a layer, whose tokens are printed
ARMS = ("trained", "untrained", "hash")  # routers whose specialisation is printed
CONFIDENCES = {"router": "the router's largest probability",
               "target": "the model's probability of the token's target"}
UNTRAINED = -1  # its number among the steps of a trace


def add_flags(parser):
  flags.add_workdir(parser, "folder of a trained run")
  parser.add_argument("--out", metavar="OUT.npz", help="file to write; its folder must be there")
  parser.add_argument("--records", metavar="N", type=flags.at_least(1), default=64, help="default 64")
  parser.add_argument("--steps", metavar="A,B,..", help="checkpoints, or all; default: the newest")
  parser.add_argument("--kind", metavar="KIND", default="dropless",
                      help="dropless (default), or with the capacity of: eval_capacity, train")
  parser.add_argument("--regret", metavar="N", type=flags.at_least(1),
                      help="also force every expert on N tokens of each record, in every sparse layer of the "
                      "last step, and write the changes of the loss to OUT.regret.npz; slow; prints its cost")


def run(args):
  config = flags.read_run_config(args, may_change(EVALUATE))
  out = _check_out(flags.need(args, "out", "trace.npz"))
  steps = args.steps
  if steps not in (None, "all"):
    steps = flags.whole_numbers("steps", steps, "wants steps with commas between them, or all", "100,200")
  flags.one_of("kind", args.kind, KINDS)

  from sparse_experts.analysis import probe, summary
  from sparse_experts.analysis.trace import trace
  from sparse_experts.analysis.untrained import untrained
  from sparse_experts.report import pictures, plots
  from sparse_experts.report.sample import Sample
  from sparse_experts.tasks import task_of
  from sparse_experts.training.run import load, source_of

  config = flags.on_these_devices(args, config)
  steps = _choose(args.workdir, steps)
  newest = load(args.workdir, steps[-1], config=config)
  layers = probe.sparse_layers(newest.abstract_model(args.kind))
  source, task = source_of(config), task_of(config)
  domains = task.domains(newest.tokenizer, source)
  batch = probe.probe(newest, args.records, task.make_dataset("valid", newest.tokenizer, source))
  earlier = (load(args.workdir, step, config=config) for step in steps[:-1])
  every = trace(itertools.chain(earlier, [newest, untrained(newest, UNTRAINED)]), batch, args.kind)
  traced, control = (_rows(every, here) for here in (every["step"] >= 0, every["step"] == UNTRAINED))
  del every

  _save(out + ".npz", traced)
  about = {
      "workdir": storage.absolute(args.workdir), "steps": steps, "kind": args.kind,
      "records": probe.num_rows(batch), "probe": probe.fingerprint(batch), "data": source.fingerprint,
      "trained_on": newest.data_fingerprint, "domains": list(domains),
      "layers": {name: {"num_experts": layer.num_experts, "k": layer.k, "heads": layer.num_heads,
                        "group_size": layer.group_size, "capacity": layer.capacity}
                 for name, layer in layers.items()}}
  experts = {name: layer.num_experts for name, layer in layers.items()}
  sample = Sample(batch, task, newest.tokenizer, domains)
  about["specialisation"] = _specialised(traced, control, experts, sample)
  storage.write_json(out + ".json", about)
  plots.save(pictures.domains(traced, experts, domains), out + ".png")
  if source.fingerprint != newest.data_fingerprint:
    print(f"the run was trained on other data than data.source='{config.data.source}'")
  print(table([summary.COLUMNS, *summary.rows(traced, experts, domains)]))
  _print_experts(traced, experts, sample, out)
  print("what tells a token's expert: normalised mutual information above that of permutations")
  print(table([("layer", "of", *ARMS), *(
      (layer, name, *(_number(of.get(arm, {}).get("above")) for arm in ARMS))
      for layer, found in about["specialisation"].items() for name, of in found.items())]))
  print(f"{summary.assignments(traced)}: {out}.npz; what of: {out}.json; domains by expert: {out}.png")
  file = repr(f"{out}.npz")
  if storage.is_address(out):
    file = f"sparse_experts.storage.open_file({file})"
  print(f"table = dict(numpy.load({file}))  # pandas.DataFrame(table)")
  if args.regret:
    traced = _rows(traced, traced["step"] == newest.step) if args.kind == "dropless" else trace(newest, batch)
    _regret(newest, batch, traced, args.regret, out + ".regret.npz")


def _specialised(traced, control, num_experts, sample):
  """{layer: {profile: {arm: figures}}} at the last step; None for a figure that is not defined."""
  import numpy as np

  from sparse_experts.analysis.profiles import specialisations

  last, of_layer = traced["step"] == traced["step"].max(), {}
  for layer, experts in num_experts.items():
    found = specialisations(layer, _rows(traced, last & (traced["layer"] == layer)),
                            _rows(control, control["layer"] == layer), experts, *sample)
    of_layer[layer] = {name: {arm: {key: float(x) if np.isfinite(x) else None for key, x in figures.items()}
                              for arm, figures in arms.items()} for name, arms in found.items()}
  return of_layer


def _rows(columns, here):
  return {name: a[here] for name, a in columns.items()}


def _number(figure):
  return "-" if figure is None else f"{figure:.4f}"


def _print_experts(traced, num_experts, sample, out):
  """Each expert's most typical tokens at the last step, and the picture of its patches."""
  from sparse_experts.report import expert_cards, patches

  last = traced["step"] == traced["step"].max()
  here = {layer: _rows(traced, last & (traced["layer"] == layer)) for layer in num_experts}
  for layer, columns in here.items():
    if not (columns["token_id"] >= 0).any():
      continue
    experts = expert_cards.typical_tokens(columns, num_experts[layer], sample)[:MOST_EXPERTS]
    print(f"{layer}, what each expert takes more often than by chance, the most typical first:")
    for e, (rows, _) in enumerate(experts):
      print(f"  expert {e:<3} " + ("  ".join(row["text"] for row in rows) or "nothing"))
    if left := num_experts[layer] - len(experts):
      print(f"  and {left} more experts: the report shows them")
  if patches.draw(here, num_experts, sample, out + ".patches.png"):
    print(f"the patches that each expert takes with the largest gates: {out}.patches.png")


def _regret(run, batch, traced, number, path):
  import numpy as np

  from sparse_experts.analysis.regret import by_confidence, regret, token_regret

  model = run.abstract_model("dropless")
  layers = model.sparse_layers
  length = min(model.length(name, batch) for name in layers)
  places = np.unique(np.linspace(0, length - 1, min(number, length)).round().astype(int)).tolist()
  forced = regret(run, batch, positions=places, traced=traced, say=lambda text: print(text, flush=True))
  _save(path, forced)
  tokens = token_regret(forced)
  for name in layers:
    here = tokens["layer"] == name
    right = (tokens["chosen"] == tokens["best"])[here].mean()
    print(f"{name}: the router chose the best expert for {right:.0%} of {here.sum():,} tokens; another would "
          f"have saved {tokens['regret'][here].mean():.4f} nats of the record's loss on average")
  for of, words in CONFIDENCES.items():
    found = by_confidence(tokens, traced, of)
    if len(found["layer"]):
      rows = [("layer", "from", "to", "tokens", "regret", "95% interval", "chose the best")]
      rows += [(layer, f"{least:.3f}", f"{most:.3f}", f"{n:,}", f"{mean:.4f}", f"{low:.4f} to {high:.4f}",
                f"{best:.0%}") for layer, n, least, most, mean, low, high, best in zip(*found.values())]
      print(f"by {words}, in quarters:\n{table(rows)}")
  print(f"{len(forced['step']):,} forced choices in {path}")


def _check_out(path):
  """The path without .npz; refuses one that cannot be written."""
  if not path.endswith(".npz"):
    raise UserError(f"--out={path} does not end in .npz; write --out={os.path.splitext(path)[0]}.npz")
  storage.check_out(path, f"--out={path}")
  return path.removesuffix(".npz")


def _choose(workdir, steps):
  from sparse_experts.training import workdir as wd
  from sparse_experts.training.checkpoints import Checkpoints

  with Checkpoints(wd.checkpoints(workdir)) as checkpoints:
    if steps == "all":
      steps = checkpoints.steps()
    return [checkpoints.choose(step) for step in steps or [None]]


def _save(path, columns):
  import numpy as np

  with storage.create(path) as f:
    np.savez_compressed(f, **columns)
