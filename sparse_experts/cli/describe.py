"""Shows what a config builds: layers, parameters, model FLOPs per token; no weight is allocated.

Model FLOPs count what the mathematics needs in a forward pass, 2 per multiply-add. `FFN sees` is what a
token's output of a sparse layer may depend on in training, drops included: itself, past tokens or its batch.
"""

import json

from sparse_experts.cli import flags
from sparse_experts.config import dense_twin

COLUMNS = ("layer", "kind", "hidden", "experts", "k", "slots train", "slots eval", "FFN sees", "params",
           "active", "FLOPs/token")


def add_flags(parser):
  flags.add_config(parser)
  parser.add_argument("--json", action="store_true", help="last line of the output is one JSON object")


def run(args):
  config = flags.read_config(args)
  found, vocab_size = describe(config)
  print(f"{config.model.name}, {config.model.dtype} activations, tokenizer {config.data.tokenizer}, "
        f"{vocab_size} ids")
  print(table([COLUMNS, *map(_row, found["layers"])]))
  print(f"\nparameters             {short(found['params_total'])} total, "
        f"{short(found['params_active'])} active")
  print(f"model FLOPs per token  {short(found['flops_per_token'])}: " + ", ".join(
      f"{part} {count / found['flops_per_token']:.1%}" for part, count in found["flops"].items()))
  if config.model.num_experts:
    twin = describe(dense_twin(config))[0]
    excess = twin["flops_per_token"] / found["flops_per_token"] - 1
    print("dense twin             --config.model.num_experts=0"
          + (" --config.model.decoder.num_experts=none" if config.model.decoder.num_experts else "")
          + f": {short(twin['params_total'])} parameters, {excess:+.2%} FLOPs")
  if args.json:
    print(json.dumps(found))


def describe(config):
  """(`models.counts.describe` with slots and causality of each sparse layer, vocabulary size)."""
  from sparse_experts import data
  from sparse_experts.models import build, counts

  needs_text = config.data.tokenizer.startswith("sentencepiece:")
  texts = [document["text"] for document in data.open_source(config.data).train] if needs_text else None
  tokenizer = data.make_tokenizer(config.data.tokenizer, texts)
  target_length = data.lengths(config.data, tokenizer)["targets"]
  found = counts.describe(config, tokenizer.vocab_size, target_length)
  train, evaluation = (build(config, tokenizer.vocab_size, phase).sparse_layers for phase in (
      "train", "eval_capacity"))
  for layer in found["layers"]:
    if sparse := train.get(layer["name"]):
      layer |= {"group_size": sparse.group_size, "capacity": sparse.capacity, "causality": sparse.causality,
                "eval_capacity": evaluation[layer["name"]].capacity}
  return found, tokenizer.vocab_size


def _row(layer):
  sparse = ("", "", "", "", "")
  if "experts" in layer:
    slots = (f"{c} of {layer['group_size']}" if c else "dropless" for c in (
        layer["capacity"], layer["eval_capacity"]))
    sparse = (layer["experts"], layer["k"], *slots, layer["causality"])
  return (layer["name"], layer["kind"], layer["hidden"], *sparse, short(layer["params"]),
          short(layer["params_active"]), short(layer["flops_per_token"]))


def table(rows) -> str:
  """Columns as wide as their widest cell, numbers to the right."""
  rows = [[str(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join("  ".join(
      cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(
          row, widths, strict=True))).rstrip() for row in rows)


def short(number: float) -> str:
  """Four digits and a unit: 1234567 -> 1.235M."""
  units = ["", "k", "M", "G", "T"]
  while abs(number) >= 1000 and len(units) > 1:
    number, units = number / 1000, units[1:]
  return f"{number:.4g}{units[0]}"
