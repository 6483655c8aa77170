"""Reads a Hugging Face checkpoint into a work directory, or writes a run as one (safetensors).

Example: python -m sparse_experts convert --from=HF_DIR --workdir=runs/mixtral

--from=HF_DIR --workdir=DIR makes DIR a run at step 0: evaluate, sample and trace it, load it in Python, train
from it with --config.init_from=DIR. --workdir=DIR --to=HF_DIR --layout=NAME writes its weights. Tensors go
one by one, so memory stays near the largest; the disk needs room for the parameters in float32 once more. A
layout is Hugging Face's model_type: mixtral, olmoe, qwen2_moe, qwen3_moe, deepseek_v3, switch_transformers.

--layout=ternary packs experts of model.expert_weights=ternary into 2 bits a weight with a scale for each
matrix, and keeps the other parameters in float32; sparse_experts.convert.ternary.read reads them in Python.
"""

from sparse_experts.cli import flags
from sparse_experts.config import may_change
from sparse_experts.config.key import CONVERT
from sparse_experts.errors import UserError


def add_flags(parser):
  flags.add_workdir(parser, "the run's folder: made new with --from, read with --to")
  parser.add_argument("--from", metavar="HF_DIR", dest="source", help="config.json and safetensors")
  parser.add_argument("--to", metavar="HF_DIR", help="new folder to write")
  parser.add_argument("--layout", metavar="NAME", help="with --to: whose names and shapes")
  parser.add_argument("--dtype", metavar="TYPE", default="float32",
                      help="with --to: float32 (default), bfloat16 or float16")
  parser.add_argument("--step", metavar="N", type=flags.at_least(0), help="with --to; default: the newest")


def run(args):
  workdir = flags.need(args, "workdir", "runs/mixtral")
  if (args.source is None) == (args.to is None):
    raise UserError("convert needs one of --from=HF_DIR, which it reads, and --to=HF_DIR, which it writes")
  if args.to is not None:
    _write(args, workdir)
    return
  if args.layout is not None or args.step is not None:
    raise UserError("--layout and --step belong to --to; what --from holds is told by its config.json")
  flags.may_only_change(args, may_change(CONVERT), "what --from holds tells the model")
  from sparse_experts.convert.read import read

  found = read(args.source, workdir, lambda config: flags.override(args, config))
  print(f"{found.layout}: {found.parameters:,} parameters of {args.source} are step 0 of {workdir}")
  if found.ignored:
    print(f"left out {len(found.ignored)} tensors that a plain language model does not use")
  print(found.tokenizer_words)


def _write(args, workdir):
  flags.may_only_change(args, (), "convert --to writes what was trained")
  layout = flags.need(args, "layout", "mixtral")
  if layout == "ternary":
    if args.dtype != "float32":
      raise UserError(f"--dtype={args.dtype} is of other layouts; leave it out with --layout=ternary")
    from sparse_experts.convert import ternary

    step = ternary.write(workdir, args.to, step=args.step)
    print(f"{workdir} at step {step} is written to {args.to}: experts in 2 bits a weight, others float32")
    return
  from sparse_experts.convert.write import write

  step = write(workdir, args.to, layout, step=args.step, dtype=args.dtype)
  print(f"{workdir} at step {step} is written to {args.to} as {layout}, {args.dtype}")
