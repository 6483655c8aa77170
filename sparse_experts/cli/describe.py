"""Shows what a config builds: layers, parameters, FLOPs per token; no weight is allocated.

Example: python -m sparse_experts describe --config=configs/smoke.py

Model FLOPs count what the mathematics needs in a forward pass, 2 per multiply-add; executed FLOPs what the
dispatch in use computes for it. `FFN sees` is what a token's output of a sparse layer may depend on in
training, drops included: itself, past tokens or its batch.

--match=flops|params --to=FILE finds the overrides of FFN widths that make the config equal to FILE in model
FLOPs per token or in parameters; --match=both makes it equal in both, by the experts' width and number. Exit
code 0 if what is left is within 1%, else 1.

--routers lists the ways of routing instead: a table of papers, what acts where a config sets no capacity
(factor and rule, or dropless), coefficients of losses and how those of layers add up, and what the tests hold
values to; then what a token's routing depends on (itself, past tokens, its sequence, the batch; a causal
decoder takes the first two), what it is, and its arguments.

--configs lists the configs that come with the package: the name, the arguments of FILE:ARG, and what it is.

--keys lists the config keys instead, --keys=WORD those with WORD in their name or meaning: the default, what
a key takes, what it means, and what it affects. That is the result (result, or training where given weights
compute the same without it, dropless), time or memory (speed), where things are (place), or the log (log).
"""

import dataclasses
import textwrap

from sparse_experts.cli import flags
from sparse_experts.cli.tables import short, table, wrapped
from sparse_experts.config import KEYS, dense_twin, load_config, shipped
from sparse_experts.config.key import Key
from sparse_experts.errors import UserError, nearest
from sparse_experts.tasks import task_of
from sparse_experts.validation import validate

# --match -> (the number of `describe` that is to be equal, its unit)
MEASURES = {"flops": ("flops_per_token", "model FLOPs per token"), "params": ("params_total", "parameters")}
BOTH = "both"


def add_flags(parser):
  flags.add_config(parser)
  flags.add_json(parser)
  parser.add_argument("--parameters", action="store_true",
                      help="list names and shapes, as init_take and train.only spell them")
  parser.add_argument("--routers", action="store_true", help="list the ways of routing and their arguments")
  parser.add_argument("--configs", action="store_true", help="list the configs that come with the package")
  parser.add_argument("--keys", metavar="WORD", nargs="?", const="", help="list the config keys")
  parser.add_argument("--match", metavar="flops|params|both",
                      help="find overrides that make it equal to --to")
  parser.add_argument("--to", metavar="FILE[:ARG]", help="the config that --match compares with")


def run(args):
  if args.routers:
    print(routers())
    return 0
  if args.configs:
    print("\n".join(configs()))
    flags.print_json(args, [dataclasses.asdict(config) for config in shipped.configs()])
    return 0
  if args.keys is not None:
    rows = keys(args.keys)
    print("\n".join(map(_key_in_words, rows)))
    flags.print_json(args, [dataclasses.asdict(row) | {
        "default": row.value, "type": row.type.__name__, "may_change": row.may_change} for row in rows])
    return 0
  config = flags.read_config(args)
  from sparse_experts.analysis import layer_table

  other = _other(args, config)
  found, vocab_size = describe(config)
  flags.print_notes(args)
  print(f"{config.model.name}, {config.model.dtype} activations, {task_of(config).reads(vocab_size)}")
  print(table([layer_table.COLUMNS, *layer_table.rows(found)]) + "\n")
  if found["warning"]:
    print(f"warning: {found['warning']}\n")
  for i, line in enumerate(layer_table.losses(found)):
    print(f"{'' if i else 'loss coefficients':23}{line}")
  _print_counts(found)
  if config.model.num_experts:
    twin = describe(dense_twin(config))[0]
    print("dense twin             --config.model.num_experts=0"
          + (" --config.model.decoder.num_experts=none" if config.model.decoder.num_experts else "")
          + f": {short(twin['params_total'])} parameters, "
          f"{twin['flops_per_token'] / found['flops_per_token'] - 1:+.2%} FLOPs")
  matched = other and _match(args, config, other)
  if matched:
    found["match"] = matched
  if args.parameters:
    found["parameters"] = parameters(config)
    print("\n" + table([(name, " x ".join(map(str, shape))) for name, shape in found["parameters"].items()]))
  flags.print_json(args, found)
  return 1 if matched and not matched["equal"] else 0


def _print_counts(found):
  """Parameters and FLOPs of the whole model."""
  total, executed = found["flops_per_token"], found["executed_flops_per_token"]
  at_most = "at most " if any("at_most" in layer for layer in found["layers"]) else ""
  print(f"parameters             {short(found['params_total'])} total, "
        f"{short(found['params_active'])} active")
  print(f"model FLOPs per token  {at_most}{short(total)}: " + ", ".join(
      f"{part} {count / total:.1%}" for part, count in found["flops"].items()))
  print(f"executed FLOPs         {short(executed)}, {executed / total:.2f} times: " + ", ".join(
      f"{part} {short(count)}" for part, count in found["executed_flops"].items() if count))


def _other(args, config):
  """The config to match, None where nothing is to be matched."""
  if args.match is None and args.to is None:
    return None
  if args.to is None:
    raise UserError(f"--match={args.match} needs --to; write for example --to=configs/smoke.py:dense")
  if args.match is None:
    raise UserError(f"--to={args.to} needs --match; write --match=flops, --match=params or --match=both")
  if args.match not in (*MEASURES, BOTH):
    raise UserError(f"--match='{args.match}' is unknown{nearest(args.match, (*MEASURES, BOTH))}")
  if args.match == BOTH and not config.model.num_experts:
    raise UserError("--match=both changes model.expert_dim and model.num_experts, but model.num_experts=0 "
                    "makes the config dense; write --match=flops or --match=params")
  other = load_config(args.to)
  validate(other)
  return other


def _match(args, config, other):
  """What --match found, printed: what is wanted and there, the overrides, and what they leave."""
  from sparse_experts.models import counts
  from sparse_experts.models.match import match, match_both

  sizes, theirs = vocabulary(config), describe(other)[0]
  count = lambda c: counts.describe(c, *sizes)
  if args.match == BOTH:
    matches = match_both(config, {of: theirs[of] for of, _ in MEASURES.values()}, count)
    each = {of: _print_match(args, m, of, unit) for (of, unit), m in zip(
        MEASURES.values(), matches.values(), strict=True)}
    overrides = next(iter(each.values()))["overrides"]
    return {"measure": BOTH, "to": args.to, "equal": all(m["equal"] for m in each.values()),
            "overrides": overrides, "each": each}
  measure, unit = MEASURES[args.match]
  return _print_match(args, match(config, theirs[measure], lambda c: count(c)[measure]), measure, unit)


def _print_match(args, m, measure, unit):
  """One measure's Match as lines and as an object."""
  print(f"\nto match  {short(m.target)} {unit} of {args.to}")
  print(f"now       {short(m.start)}, {m.start / m.target - 1:+.2%}", end="")
  if m.overrides:
    print("\n          " + " ".join(f"--config.{key}={width}" for key, width in m.overrides.items()))
    print(f"then      {short(m.reached)}, {m.excess:+.2%}", end="")
  why = "the FFNs cannot be narrower" if m.narrowest else "no width that divides is nearer"
  print(": equal" if m.is_equal else f": {why}; change num_layers, embed_dim or num_experts by hand")
  return {"measure": measure, "to": args.to, "target": m.target, "start": m.start, "reached": m.reached,
          "excess": m.excess, "equal": m.is_equal, "overrides": m.overrides}


def routers() -> str:
  """What can stand in model.router.name: a table of conventions, then each one's arguments."""
  from sparse_experts.moe.facts import all_facts

  facts = all_facts()
  rows = [("router", "papers", "capacity", "losses", "layers", "values held to"), *(
      (f.name, ", ".join(f.papers) or "-", f.capacity, f.coefficients or "-", f.layer_losses or "-",
       f.held_to) for f in facts)]
  lines = wrapped(rows, (20, 18, 15, 17, 6, 24))
  below = " " * 32
  for f in facts:
    lines += ["", *textwrap.wrap(f"{f.name:22}{f.causality:10}{f.summary}", 110, subsequent_indent=below)]
    lines += textwrap.wrap(" ".join(f"{name}={value}" for name, value in f.arguments.items()), 110,
                           initial_indent=below, subsequent_indent=below)
  return "\n".join(lines)


def configs() -> list[str]:
  """The configs of the package in words."""
  lines = []
  for config in shipped.configs():
    lines.append(f"{config.name:26}{config.summary}")
    if config.variants:
      lines.append(" " * 26 + " ".join(f":{name}" for name in config.variants))
  return lines


def keys(word: str) -> list[Key]:
  """The rows of the config keys that have the word in their name or meaning."""
  rows = [row for row in KEYS.values() if word.lower() in f"{row.name} {row.meaning}".lower()]
  if not rows:
    raise UserError(f"--keys={word} is in no config key's name or meaning; write --keys to list all")
  return rows


def _key_in_words(row):
  takes = " | ".join(filter(None, (*row.choices, row.open_to))) or row.range or {
      bool: "true | false", tuple: "whole numbers, as 1,3"}.get(row.type, "text")
  default = "unset" if row.is_unset else "''" if row.value == "" else row.value
  heads = textwrap.wrap(f"{row.name}={default}  [{takes}]  affects: {row.affects}", 110,
                        subsequent_indent="  ", break_on_hyphens=False)
  return "\n".join(heads + textwrap.wrap(row.meaning, 110, initial_indent="    ", subsequent_indent="    "))


def parameters(config):
  """{name: shape} of every parameter, and of router state, layer by layer."""
  import jax

  from sparse_experts.models import build, names

  params, buffers = jax.eval_shape(build(config, vocabulary(config)[0]).init, jax.random.key(0))
  return dict(sorted((names.shapes(params) | names.shapes(buffers, params)).items()))


def vocabulary(config):
  """(number of ids, length of the targets), for which a tokenizer of one's own is trained."""
  task = task_of(config)
  tokenizer = task.make_vocabulary()
  return tokenizer.vocab_size, task.row_lengths(tokenizer)["targets"]


def describe(config):
  """(`layer_table.describe` of the config, vocabulary size)."""
  from sparse_experts.analysis import layer_table

  vocab_size, target_length = vocabulary(config)
  return layer_table.describe(config, vocab_size, target_length), vocab_size
