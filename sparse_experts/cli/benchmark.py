"""Measures how fast it is here: `layer`, sparse layers against their experts' products alone.

benchmark layer  each dispatch of a workload over its floor: the experts' products over exactly the routed
  rows as one batched product, timed in the same rounds; medians, and quartiles of the ratio. Needs only jax,
  flax and numpy, and runs on a CPU or a GPU.

docs/measures.md defines every number; experiments/speed/README.md says what came out.
"""

import json

from sparse_experts.cli import flags
from sparse_experts.cli.describe import table
from sparse_experts.errors import UserError, nearest

DTYPES = ("float32", "bfloat16")
DISPATCHES = ("ragged", "scatter", "einsum")
LAYER_DEFAULT = ("switch", "st_moe", "fine_grained")
LAYER = (*LAYER_DEFAULT, "st_moe_large", "fine_grained_large")


def add_flags(parser):
  parser.add_argument("what", metavar="layer", nargs="?", help="what to measure")
  parser.add_argument("--workload", metavar="NAME", default="all",
                      help=f"of layer: {', '.join(LAYER)}, or all (default): {', '.join(LAYER_DEFAULT)}")
  parser.add_argument("--dispatch", metavar="A,B,..", help="default: those that suit the workload")
  parser.add_argument("--dtype", metavar="NAME", help=f"of activations: {' or '.join(DTYPES)}")
  parser.add_argument("--runs", metavar="N", type=flags.at_least(1), default=9,
                      help="rounds of which the median is taken; default 9")
  parser.add_argument("--json", action="store_true", help="last line of the output is one JSON object")


def run(args):
  if not args.what:
    raise UserError("benchmark needs to know what; write for example: benchmark layer --workload=switch")
  if args.what not in BENCHMARKS:
    raise UserError(f"benchmark '{args.what}' is unknown{nearest(args.what, BENCHMARKS)}")
  if args.dtype is not None and args.dtype not in DTYPES:
    raise UserError(f"--dtype={args.dtype} is unknown{nearest(args.dtype, DTYPES)}")
  found = BENCHMARKS[args.what](args)
  if args.json:
    print(json.dumps(found))


def run_layer(args):
  names = LAYER_DEFAULT if args.workload == "all" else args.workload.split(",")
  for name in names:
    if name not in LAYER:
      raise UserError(f"--workload={name} is unknown{nearest(name, [*LAYER, 'all'])}")
  dispatches = args.dispatch.split(",") if args.dispatch else None
  for name in dispatches or ():
    if name not in DISPATCHES:
      raise UserError(f"--dispatch={name} is unknown{nearest(name, DISPATCHES)}")

  import dataclasses

  from sparse_experts.benchmark import layer, timing

  found = timing.machine()
  print(_machine(found))
  found["workloads"] = {}
  for name in names:
    workload = layer.WORKLOADS[name]
    if args.dtype:
      workload = dataclasses.replace(workload, dtype=args.dtype)
    found["workloads"][name] = measured = layer.measure(workload, args.runs, dispatches)
    print(f"\n{name}\n{layer_table(measured)}", flush=True)
  return found


def layer_table(w):
  """A workload's figures in words."""
  capacity = f"capacity {w['capacity_factor']}" if w["capacity_factor"] else "dropless"
  rows = [("dispatch", "fwd ms", "over floor", "fwd+bwd ms", "over floor", "quartiles", "rows",
           "router+dispatch", "dropped", "load max/mean", "TFLOP/s")]
  floor = next(iter(w["dispatches"].values()))
  rows.append(("floor", f"{floor['floor_forward_ms']:.2f}", "1", f"{floor['floor_forward_backward_ms']:.2f}",
               "1", "", "1", "", "", "", f"{w['floor_tflops']:.3g}"))
  for name, d in w["dispatches"].items():
    low, high = d["forward_backward_over_floor_quartiles"]
    rows.append((name, f"{d['forward_ms']:.2f}", f"{d['forward_over_floor']:.3f}",
                 f"{d['forward_backward_ms']:.2f}", f"{d['forward_backward_over_floor']:.3f}",
                 f"{low:.3f}-{high:.3f}", f"{d['rows_over_floor']:.2f}",
                 f"{d['router_dispatch_share']:.1%}", f"{d['dropped']:.1%}", f"{d['load_max_mean']:.2f}",
                 f"{d['tflops']:.3g}"))
  return (f"{w['tokens']} tokens, d {w['embed_dim']}, {w['num_experts']} experts of hidden {w['expert_dim']}"
          f" ({w['activation']}), top-{w['k']}, {capacity}, {w['dtype']}, {w['runs']} rounds\n"
          f"{table(rows)}\n"
          f"router alone {w['router_ms']:.2f} ms fwd+bwd; a square product reaches {w['matmul_tflops']:.3g} "
          f"TFLOP/s; dropless, fwd+bwd holds {w['memory_mib']:.0f} MiB, {w['memory_over_least']:.2f} times "
          "its inputs, weights, gradients and routed rows")


def _machine(m):
  return (f"{m['device']} ({m['platform']}, {m['devices']} devices, {m['cores']} cores), jax {m['jax']}, "
          f"jaxlib {m['jaxlib']}, Python {m['python']}")


BENCHMARKS = {"layer": run_layer}
