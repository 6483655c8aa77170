"""Measures speed on this machine: a `layer`, `tiles`, whole train `step`s, cached `decode`ing.

benchmark layer   each dispatch of a workload over its floor, the experts' products over exactly the routed
  rows as one batched product. `scaling`: what a layer adds to its floor, by experts and by tokens; `routers`:
  each router alone. Needs only jax, flax and numpy, and runs on a CPU or a GPU.
benchmark tiles   on a TPU: which tiles of the kernel for grouped products suit a workload of layer best.
benchmark step    a config against its dense twin; compile time against depth; time to the first step.
benchmark decode  a decoder, its dense twin and a dense one of as many parameters, by batch size.

docs/measures.md defines every number; experiments/speed/README.md has results.
"""

import dataclasses
import json

from sparse_experts.cli import flags
from sparse_experts.cli.describe import table, vocabulary
from sparse_experts.config.schema import KEYS
from sparse_experts.errors import UserError, nearest

DEFAULT_CONFIG = "configs/smoke.py"
DTYPES = ("float32", "bfloat16")
BACKENDS = KEYS["model.backend"].choices
DISPATCHES = KEYS["model.dispatch"].choices
LAYER_DEFAULT = ("switch", "st_moe", "fine_grained")
LAYER = (*LAYER_DEFAULT, "scaling", "routers", "st_moe_large", "fine_grained_large")


def add_flags(parser):
  parser.add_argument("what", metavar="layer|tiles|step|decode", nargs="?", help="what to measure")
  flags.add_config(parser)
  parser.add_argument("--workload", metavar="NAME",
                      help=f"of layer: {', '.join(LAYER)}, or all (default): {', '.join(LAYER_DEFAULT)}; of "
                           "tiles one of its shapes")
  parser.add_argument("--dispatch", metavar="A,B,..", help="of layer; default: those that suit the workload")
  parser.add_argument("--backend", metavar="NAME",
                      help=f"of ragged's products in layer: {' or '.join(BACKENDS)}; default: the platform's")
  parser.add_argument("--dtype", metavar="NAME", help=f"of layer's activations: {' or '.join(DTYPES)}")
  parser.add_argument("--runs", metavar="N", type=flags.at_least(1), default=9,
                      help="rounds of which the median is taken; default 9")
  parser.add_argument("--json", action="store_true", help="last line of the output is one JSON object")


def run(args):
  if not args.what:
    raise UserError("benchmark needs what to measure; write for example: benchmark layer --workload=switch")
  if args.what not in BENCHMARKS:
    raise UserError(f"benchmark '{args.what}' is unknown{nearest(args.what, BENCHMARKS)}")
  if args.dtype is not None and args.dtype not in DTYPES:
    raise UserError(f"--dtype={args.dtype} is unknown{nearest(args.dtype, DTYPES)}")
  if args.backend is not None and args.backend.split(":")[0] not in BACKENDS:
    raise UserError(f"--backend={args.backend} is unknown{nearest(args.backend, BACKENDS)}")
  only = {"workload": "layer and tiles", "dispatch": "layer", "dtype": "layer and tiles", "backend": "layer",
          "config": "step and decode"}
  for flag, of in only.items():
    if getattr(args, flag) is not None and args.what not in of:
      raise UserError(f"--{flag} is for benchmark {of}; leave it out of benchmark {args.what}")
  result = BENCHMARKS[args.what](args)
  if args.json:
    print(json.dumps(result))


def run_layer(args):
  names = LAYER_DEFAULT if args.workload in (None, "all") else args.workload.split(",")
  for name in names:
    if name not in LAYER:
      raise UserError(f"--workload={name} is unknown{nearest(name, [*LAYER, 'all'])}")
  dispatches = args.dispatch.split(",") if args.dispatch else None
  for name in dispatches or ():
    if name not in DISPATCHES:
      raise UserError(f"--dispatch={name} is unknown{nearest(name, DISPATCHES)}")
  if args.overrides:
    raise UserError(f"--config.{args.overrides[0][0]}: benchmark layer reads no config; leave it out")

  from sparse_experts.benchmark import layer, routers, scaling

  result = _machine() | {"workloads": {}}
  for name in names:
    print(f"\n{name}")
    if name == "scaling":
      measured = scaling.measure(args.runs, dispatches, args.dtype, say=_print_scaling)
      few, *_, many = (row["num_experts"] for row in measured["by_experts"])
      for dispatch, growth in measured["growth"].items():
        print(f"{dispatch}: {many} experts add to the floor {growth['overhead_growth']:.2f} times what {few} "
              f"do, {growth['dispatch_growth']:.2f} without the router; time per token, most tokens over "
              f"fewest, {growth['token_growth']:.2f}")
    elif name == "routers":
      measured = routers.measure(args.runs)
      print(table([("router", "k", "fwd ms", "fwd+bwd ms", "over top_k")] + [
          (router, r["k"], f"{r['forward_ms']:.2f}", f"{r['forward_backward_ms']:.2f}",
           f"{r['over_top_k']:.2f}") for router, r in measured["routers"].items()]))
    else:
      workload = layer.WORKLOADS[name]
      if args.dtype:
        workload = dataclasses.replace(workload, dtype=args.dtype)
      workload = dataclasses.replace(workload, backend=args.backend)
      measured = layer.measure(workload, args.runs, dispatches)
      print(layer_table(measured), flush=True)
    result["workloads"][name] = measured
  return result


def run_tiles(args):
  from sparse_experts.benchmark import layer, tiles

  name = args.workload or "st_moe_large"
  if name not in layer.WORKLOADS:
    raise UserError(f"--workload={name} is no layer to try tiles on{nearest(name, layer.WORKLOADS)}")
  workload = layer.WORKLOADS[name]
  workload = dataclasses.replace(workload, dtype=args.dtype or workload.dtype)
  result = tiles.measure(workload, args.runs, say=print)
  fastest_first = sorted(result["backend_ms"].items(), key=lambda row: row[1])
  print(table([("backend", "fwd+bwd ms")] + [(backend, f"{ms:.2f}") for backend, ms in fastest_first]))
  print(f"fastest: --config.model.backend={result['fastest']}", flush=True)
  return _machine() | {"workload": name} | result


def _print_scaling(row):
  parts = (f"{name} {d['forward_backward_ms']:.2f} (+{d['overhead_ms']:.2f})"
           for name, d in row["dispatches"].items())
  print(f"{row['num_experts']:>4} experts {row['tokens']:>6} tokens: fwd+bwd ms floor "
        f"{row['floor_forward_backward_ms']:.2f}, {', '.join(parts)}, router {row['router_ms']:.2f}",
        flush=True)


def run_step(args):
  args.config = args.config or DEFAULT_CONFIG
  config = flags.read_config(args)

  from sparse_experts.benchmark import startup, step

  result = _machine() | {"config": args.config} | step.measure(config, args.runs)
  low, high = result["step_over_dense_quartiles"]
  print(f"step of {result['tokens']} tokens: {result['step_ms']:.1f} ms, dense twin "
        f"{result['dense_step_ms']:.1f} ms: {result['step_over_dense']:.3f} times ({low:.3f}-{high:.3f}), "
        f"{args.runs} rounds", flush=True)
  result |= startup.compile_growth(config)
  print("the train step compiles in " + ", ".join(
      f"{seconds:.1f} s with {n} layers" for n, seconds in zip(
          result["compile_layers"], result["compile_seconds"], strict=True))
        + f": {result['compile_growth']:.2f} times", flush=True)
  result |= startup.first_steps(
      [f"--config={args.config}", *(f"--config.{k}={v}" for k, v in args.overrides)])
  print(f"from the shell to the first step {result['first_step_cold_seconds']:.1f} s, "
        f"{result['first_step_warm_seconds']:.1f} s with compiled programs kept")
  return result


def run_decode(args):
  args.config = args.config or DEFAULT_CONFIG
  config = flags.read_config(args)

  from sparse_experts.benchmark import decode

  result = _machine() | {"config": args.config}
  return result | decode.measure(config, vocabulary(config)[0], args.runs, say=_print_decode)


def _print_decode(row):
  print(f"batch {row['batch']:>3}: " + "; ".join(
      f"{name} {m['ms_per_token']:.2f} ms a token, {m['tokens_per_second']:,.0f} tokens/s, "
      f"{m['weight_mib']:.1f} MiB of weights" for name, m in row["models"].items()), flush=True)


def layer_table(w):
  """A workload's figures as a table."""
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


def _machine():
  from sparse_experts.benchmark import timing

  m = timing.machine()
  print(f"{m['device']} ({m['platform']}, {m['devices']} devices, {m['cores']} cores), jax {m['jax']}, "
        f"jaxlib {m['jaxlib']}, Python {m['python']}")
  return m


BENCHMARKS = {"layer": run_layer, "tiles": run_tiles, "step": run_step, "decode": run_decode}
