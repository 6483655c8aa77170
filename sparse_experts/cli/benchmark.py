"""Measures speed on this machine: a `layer`, train `step`s, cached `decode`ing, `peers` next to us.

Example: python -m sparse_experts benchmark layer --workload=switch

benchmark layer   each dispatch of a workload over its floor, the experts' products over exactly the routed
  rows as one batched product. --routing=TRACE.npz: also for the routing of a trained run's layers, as
  `trace --out` wrote it. `scaling`: what a layer adds to its floor, by experts and by tokens; `routers`:
  each router alone. Needs only jax, flax and numpy, and runs on a CPU or a GPU.
benchmark step    a config against its dense twin; compile time against depth; time to the first step.
benchmark decode  a decoder, its dense twin and a dense one of as many parameters, by batch size.
benchmark peers   the same layer in Hugging Face transformers and MaxText, each in a virtual environment that
  is made for it (from the network: gigabytes, minutes), and our and MaxText's program for a TPU slice.

docs/measures.md defines every number; experiments/speed/README.md has results.
"""

import dataclasses

from sparse_experts import terminal
from sparse_experts.cli import flags
from sparse_experts.cli.tables import figures, table
from sparse_experts.config import KEYS
from sparse_experts.errors import UserError, nearest
from sparse_experts.tasks import task_of

DEFAULT_CONFIG = "configs/smoke.py"
DTYPES = ("float32", "bfloat16")
BACKENDS = KEYS["model.backend"].choices
DISPATCHES = KEYS["model.dispatch"].choices
LAYER_DEFAULT = ("switch", "st_moe", "fine_grained")
PEERS = ("mixtral_small", "mixtral_8x7b")  # timed on a CPU; compiled for a TPU
LAYER = (*LAYER_DEFAULT, "scaling", "routers", "st_moe_large", "fine_grained_large")
# flag -> the measurements that read it
ONLY = {"workload": "layer and peers", "dispatch": "layer", "dtype": "layer", "backend": "layer",
        "routing": "layer", "config": "step and decode"}

# Columns of the tables, of figures that docs/measures.md defines.
DISPATCH_COLUMNS = [
    ("fwd ms", "{forward_ms:.2f}"), ("over floor", "{forward_over_floor:.3f}"),
    ("fwd+bwd ms", "{forward_backward_ms:.2f}"), ("over floor", "{forward_backward_over_floor:.3f}"),
    ("quartiles", "{forward_backward_over_floor_quartiles[0]:.3f}-"
                  "{forward_backward_over_floor_quartiles[1]:.3f}"), ("rows", "{rows_over_floor:.2f}"),
    ("router+dispatch", "{router_dispatch_share:.1%}"), ("dropped", "{dropped:.1%}"),
    ("load max/mean", "{load_max_mean:.2f}"), ("TFLOP/s", "{tflops:.3g}")]
PEER_COLUMNS = [
    ("fwd+bwd ms", "{layer_ms:.0f}"),
    ("quartiles", "{layer_ms_quartiles[0]:.0f}-{layer_ms_quartiles[1]:.0f}"),
    ("its floor ms", "{own_floor_ms:.0f}"), ("over its floor", "{over_own_floor:.2f}"),
    ("over our floor", "{over_our_floor:.2f}"),
    ("quartiles", "{over_our_floor_quartiles[0]:.2f}-{over_our_floor_quartiles[1]:.2f}"),
    ("dropped", "{dropped:.1%}"), ("differs by", "{difference:.0e}")]
PROGRAM_COLUMNS = [
    ("peak GiB", "{peak_gib:.2f}"), ("temporaries", "{temporaries_gib:.2f}"), ("sent MiB", "{sent_mib:.0f}"),
    ("exchanged", "{exchanged_mib:.0f}"), ("TFLOPs", "{compiler_tflops:.1f}"),
    ("compiled in", "{compile_seconds:.0f} s")]
ROUTER_COLUMNS = [("k", "{k}"), ("fwd ms", "{forward_ms:.2f}"), ("fwd+bwd ms", "{forward_backward_ms:.2f}"),
                  ("over top_k", "{over_top_k:.2f}")]


def add_flags(parser):
  parser.add_argument("what", metavar="layer|step|decode|peers", nargs="?", help="what to measure")
  flags.add_config(parser)
  parser.add_argument("--workload", metavar="NAME",
                      help=f"of layer: {', '.join(LAYER)}, or all (default): {', '.join(LAYER_DEFAULT)}; of "
                           f"peers {' or '.join(PEERS)} (default: both)")
  parser.add_argument("--dispatch", metavar="A,B,..", help="of layer; default: those that suit the workload")
  parser.add_argument("--backend", metavar="NAME",
                      help=f"of ragged's products in layer: {' or '.join(BACKENDS)}; default: the platform's")
  parser.add_argument("--dtype", metavar="NAME", help=f"of layer's activations: {' or '.join(DTYPES)}")
  parser.add_argument("--routing", metavar="TRACE.npz[:LAYER]",
                      help="of layer: also time the routing of a trained run, which `trace --out` wrote: "
                      "of one of its layers, or of each; needs a workload with as many experts and k")
  parser.add_argument("--runs", metavar="N", type=flags.at_least(1), default=9,
                      help="rounds of which the median is taken; default 9")
  flags.add_json(parser)


def run(args):
  if not args.what:
    raise UserError("benchmark needs what to measure; write for example: benchmark layer --workload=switch")
  if args.what not in BENCHMARKS:
    raise UserError(f"benchmark '{args.what}' is unknown{nearest(args.what, BENCHMARKS)}")
  flags.one_of("dtype", args.dtype, DTYPES)
  flags.one_of("backend", args.backend, BACKENDS)
  for flag, of in ONLY.items():
    if getattr(args, flag) is not None and args.what not in of:
      raise UserError(f"--{flag} is for benchmark {of}; leave it out of benchmark {args.what}")
  args.config = args.config or DEFAULT_CONFIG
  flags.print_json(args, BENCHMARKS[args.what](args))


def run_layer(args):
  every = args.workload in (None, "all")
  names = LAYER_DEFAULT if every else args.workload.split(",")
  dispatches = args.dispatch.split(",") if args.dispatch else None
  for name in names:
    flags.one_of("workload", name, LAYER)
  for name in dispatches or ():
    flags.one_of("dispatch", name, DISPATCHES)
  flags.may_only_change(args, (), "benchmark layer reads no config")

  from sparse_experts.benchmark import layer, routers, scaling

  routings = _routings(args, names, every) if args.routing else {name: {} for name in names}
  names = list(routings)
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
      print(table(figures("router", ROUTER_COLUMNS, measured["routers"])))
    else:
      measured = layer.measure(_workload(args, name), args.runs, dispatches, routings[name])
      print(layer_table(measured), flush=True)
      for of, found in measured.get("routings", {}).items():
        of_run = layer_table(measured | {"dispatches": found}, last=False)
        print(f"\n{name}, tokens routed as in {of}\n{of_run}", flush=True)
    result["workloads"][name] = measured
  return result


def _routings(args, names, every):
  """{workload: {layer: expert_NK}}; of all workloads, those that have the trace's experts and k."""
  from sparse_experts.benchmark import layer, traced

  found = traced.read(args.routing)
  if others := [name for name in names if name not in layer.WORKLOADS]:
    raise UserError(f"--routing is for shapes of a layer, which --workload={others[0]} is not; choose of "
                    f"{', '.join(layer.WORKLOADS)}")
  if every:
    shapes = {(of.num_experts, of.k) for of in found.values()}
    names = [name for name in names
             if shapes == {(layer.WORKLOADS[name].num_experts, layer.WORKLOADS[name].k)}] or names[:1]
  make = lambda name, w: {of: traced.choices(args.routing, of, routing, name, w.num_experts, w.k, w.tokens)
                          for of, routing in found.items()}
  return {name: make(name, layer.WORKLOADS[name]) for name in names}


def _workload(args, name):
  from sparse_experts.benchmark import layer

  workload = layer.WORKLOADS[name]
  return dataclasses.replace(workload, dtype=args.dtype or workload.dtype, backend=args.backend)


def _print_scaling(row):
  parts = (f"{name} {d['forward_backward_ms']:.2f} (+{d['overhead_ms']:.2f})"
           for name, d in row["dispatches"].items())
  print(f"{row['num_experts']:>4} experts {row['tokens']:>6} tokens: fwd+bwd ms floor "
        f"{row['floor_forward_backward_ms']:.2f}, {', '.join(parts)}, router {row['router_ms']:.2f}",
        flush=True)


def run_step(args):
  config = flags.read_config(args)
  flags.print_notes(args)

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
  config = flags.read_config(args)
  flags.print_notes(args)

  from sparse_experts.benchmark import decode

  vocab_size = task_of(config).make_vocabulary().vocab_size
  return _machine() | {"config": args.config} | decode.measure(
      config, vocab_size, args.runs, say=_print_decode)


def _print_decode(row):
  print(f"batch {row['batch']:>3}: " + "; ".join(
      f"{name} {m['ms_per_token']:.2f} ms a token, {m['tokens_per_second']:,.0f} tokens/s, "
      f"{m['weight_mib']:.1f} MiB of weights" for name, m in row["models"].items()), flush=True)


def run_peers(args):
  names = PEERS if args.workload in (None, "all") else args.workload.split(",")
  for name in names:
    flags.one_of("workload", name, PEERS)
  flags.may_only_change(args, (), "benchmark peers reads no config")

  from sparse_experts.benchmark.peers import layers, programs

  result = _machine()
  if PEERS[0] in names:
    result["layers"] = layers.measure(layers.WORKLOAD, args.runs, say=terminal.tell)
    print(f"\n{_shapes(layers.WORKLOAD)}, {args.runs} rounds\n"
          f"{peer_table(result['layers'], PEER_COLUMNS)}", flush=True)
  if PEERS[1] in names:
    result["programs"] = programs.measure(programs.WORKLOAD, say=terminal.tell)
    print(f"\n{programs.TOPOLOGY}: {_shapes(programs.WORKLOAD)}, forward and backward; a chip's\n"
          f"{peer_table(result['programs'], PROGRAM_COLUMNS)}", flush=True)
  return result


def _shapes(w):
  return (f"{w.tokens} tokens, d {w.embed_dim}, {w.num_experts} experts of hidden {w.expert_dim} "
          f"({w.activation}), top-{w.k}, {w.dtype}")


def peer_table(rows, columns):
  """A table of what was measured, then why the rest was not, then the versions."""
  run = {name: row for name, row in rows.items() if "not_run" not in row}
  width = max(map(len, rows))
  lines = [line for line in [table(figures("", columns, run))] if run]
  lines += [f"{name:<{width}}  not run: {row['not_run']}" for name, row in rows.items() if name not in run]
  versions = dict.fromkeys(", ".join(f"{name} {version}" for name, version in row["versions"].items())
                           for row in run.values())
  return "\n".join([*lines, *versions])


def layer_table(w, last=True):
  """A workload's figures as a table; `last`: with a line on what is not of a dispatch."""
  rows = figures("dispatch", DISPATCH_COLUMNS, w["dispatches"])
  floor = next(iter(w["dispatches"].values()))
  forward, both = floor["floor_forward_ms"], floor["floor_forward_backward_ms"]
  rows.insert(1, ("floor", f"{forward:.2f}", "1", f"{both:.2f}", "1", "", "1", "", "", "",
                  f"{w['floor_tflops']:.3g}"))
  capacity = f"capacity {w['capacity_factor']}" if w["capacity_factor"] else "dropless"
  lines = [
      f"{w['tokens']} tokens, d {w['embed_dim']}, {w['num_experts']} experts of hidden {w['expert_dim']}"
      f" ({w['activation']}), top-{w['k']}, {capacity}, {w['dtype']}, {w['runs']} rounds", table(rows),
      f"router alone {w['router_ms']:.2f} ms fwd+bwd; a square product reaches {w['matmul_tflops']:.3g} "
      f"TFLOP/s; dropless, fwd+bwd holds {w['memory_mib']:.0f} MiB, {w['memory_over_least']:.2f} times "
      "its inputs, weights, gradients and routed rows"]
  return "\n".join(lines if last else lines[:-1])


def _machine():
  from sparse_experts.benchmark import timing

  m = timing.machine()
  print(f"{m['device']} ({m['platform']}, {m['devices']} devices, {m['cores']} cores), jax {m['jax']}, "
        f"jaxlib {m['jaxlib']}, Python {m['python']}")
  return m


BENCHMARKS = {"layer": run_layer, "step": run_step, "decode": run_decode, "peers": run_peers}
