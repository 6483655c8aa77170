"""Compiles a config's train step for a TPU slice, without a TPU, and prints its memory and collectives.

Example: python -m sparse_experts compile --config=configs/smoke.py --topology=v5e:2x4 --config.mesh.data=8

It needs libtpu (pip install '.[aot]') and minutes. Topologies: v4:2x2x1, v5e:4x4, v5p:8x8x8,
v6e:16x16, tpu7x:4x4x4 and so on. `config.mesh` must use all their devices, of which tpu7x has two a chip.
docs/measures.md defines the numbers; the step time is an estimate from published rates. A
step that does not fit is a valid result: exit code 0.

--find with --topology=v5p tries slices of that chip, the smallest first, until one has a mesh that fits; exit
code 1 if none does.
"""

import os

from sparse_experts import terminal
from sparse_experts.cli import flags
from sparse_experts.cli.tables import short, table
from sparse_experts.errors import UserError

TERMS = {"hbm": "HBM", "dcn": "data center network", "overlapped": "the largest, if all else is hidden",
         "serial": "one after another"}
PHASES = ("forward", "recomputed", "backward", "update")


def add_flags(parser):
  flags.add_config(parser)
  parser.add_argument("--topology", metavar="CHIP:SHAPE", help="a TPU slice, for example v5p:8x8x8")
  parser.add_argument("--slices", metavar="N", type=flags.at_least(1), default=1,
                      help="so many of them, into which config.mesh.dcn cuts the axes")
  parser.add_argument("--find", action="store_true", help="find the smallest slice and a mesh that fit")
  flags.add_json(parser)


def run(args):
  topology = flags.need(args, "topology", "v5e:2x4")
  from sparse_experts.aot import chips

  os.environ.update(chips.ENVIRONMENT)  # before jax is imported
  config = flags.read_config(args)
  chip, edges = chips.parse(topology)
  if args.find and (edges or args.slices > 1):
    raise UserError(f"--find looks for a slice itself; write --topology={chip}, and no --slices")
  if not args.find and not edges:
    raise UserError(f"--topology={topology} names no slice; write for example {chips.slices(chip)[2]}, or "
                    "add --find")
  chips.need_libtpu(topology)
  where = None if args.find else chips.get_slice(topology, args.slices)
  from sparse_experts.aot import fit
  from sparse_experts.aot import program as aot
  from sparse_experts.tasks import task_of

  shapes = aot.Shapes(config, task_of(config).make_vocabulary())
  flags.print_notes(args)
  if where is None:
    return _find(args, fit.find(shapes, config, chip, _say), chip)
  plan = shapes.plan(config, where.devices)
  _say(f"compiling the train step for {_place(where)}; this can take minutes")
  return _report(args, aot.compile_step(plan), where, {})


def _find(args, tries, chip):
  tried = {"tried": [str(t) for t in tries]}
  if not tries or not tries[-1].fits:
    print(f"no slice of {chip} was found that fits; set model.remat, train.accumulate or another batch size")
    flags.print_json(args, {"fits": False} | tried)
    return 1
  return _report(args, tries[-1].program, tries[-1].where, tried)


def _report(args, program, where, more):
  from sparse_experts.aot import cost

  mesh = dict(program.plan.mesh.shape) | {"fsdp": program.plan.config.mesh.fsdp}
  figures = cost.summary(program, where) | {
      "topology": where.name, "slices": where.count, "mesh": mesh} | more
  print(as_text(figures, program, where))
  flags.print_json(args, figures)
  return 0


def _say(text):
  terminal.tell(text)


def _place(where):
  return f"{where.count} slices of {where.name}" if where.count > 1 else where.name


def as_text(figures, program, where):
  """The numbers of `cost.summary`, for people."""
  flags_of_mesh = " ".join(f"--config.mesh.{axis}={str(n).lower()}" for axis, n in figures["mesh"].items())
  memory = dict(figures["hbm_per_chip_gib"])
  peak, usable = memory.pop("peak"), memory.pop("usable")
  verdict = "fits" if figures["fits"] else "does not fit"
  lines = [
      f"{_place(where)}, {figures['chips']} chip{'s' * (figures['chips'] > 1)}: {flags_of_mesh}",
      f"parameters      {short(figures['params_total'])} total, {short(figures['params_active'])} active",
      f"FLOPs per chip  {short(figures['flops_per_chip'])} a step, "
      f"{short(figures['model_flops_per_chip'])} of them model FLOPs", "",
      table([("HBM per chip", "", "GiB"), *((name.replace("_", " "), "", f"{size:.3f}")
             for name, size in memory.items())]),
      f"peak {peak:.2f} of {usable:g} GiB that a program may use: {verdict}" if peak is not None else
      f"{verdict} in {usable:g} GiB: {program.too_large}"]
  if figures["collectives"]:
    rows: list[tuple] = [("collectives per step", "", "count", "sent by a chip", "recomputed", "sent")]
    for kind, c in figures["collectives"].items():
      again = (c["recomputed_count"], _size(c["recomputed_bytes"])) if c["recomputed_count"] else ("", "")
      rows.append((kind, "at least" if c["at_least"] else "", c["count"], _size(c["bytes"]), *again))
    lines += ["", table(rows)]
    rows = [("per sparse layer", "", *(word for phase in PHASES for word in (phase, "sent")))]
    for kind, phases in figures["per_sparse_layer"].items():
      cells = [phases.get(phase) for phase in PHASES]
      rows.append((kind, "", *(word for c in cells for word in (
          (f"{c['count']:.3g}", _size(c["bytes"])) if c else ("", "")))))
    lines += ["", table(rows)] if len(rows) > 1 else []
  if figures["estimated_step_seconds"]:
    rows = [("estimate from published rates, not a measurement", "", "ms per step")]
    for term, seconds in figures["estimated_step_seconds"].items():
      if seconds or term != "dcn":
        rows.append((TERMS.get(term, term), "", f"{1e3 * seconds:.3g}"))
    lines += ["", table(rows)]
  return "\n".join([*lines, f"compiled in {figures['compile_seconds']:.0f} s"])


def _size(count):
  return short(count, (" B", " KiB", " MiB", " GiB"), 1024)
