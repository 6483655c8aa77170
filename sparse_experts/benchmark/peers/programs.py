"""Compiles our layer and MaxText's for TPU chips without a TPU: memory, collectives and FLOPs per chip."""

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from sparse_experts import storage
from sparse_experts.aot import chips
from sparse_experts.benchmark.layer import Workload
from sparse_experts.benchmark.peers import environments, processes
from sparse_experts.benchmark.peers.layers import HERE, environment
from sparse_experts.errors import UserError
from sparse_experts.profiling import hlo

# name -> (environment, whose layer_*.py): ours also by the compiler that MaxText's is compiled by
PROGRAMS = {"ours": ("ours", "ours"), "ours, MaxText's jax": ("maxtext", "ours"),
            "MaxText": ("maxtext", "maxtext")}
TOPOLOGY = "v5p:4x4x4"
EXPERT = 8  # devices of the mesh's axis `expert`; the rest are `data`
# Mixtral-8x7B's layer, a row of 4,096 tokens on each of the 64 chips.
WORKLOAD = Workload(64 * 4096, 4096, 14336, 8, 2, "swiglu", group_size=4096, dtype="bfloat16")
MINUTES = 30  # for one program


def measure(w: Workload, names: Sequence[str] = tuple(PROGRAMS), topology: str = TOPOLOGY,
            say: Callable[[str], None] = lambda line: None) -> dict[str, dict[str, Any]]:
  """{program: the figures that docs/measures.md defines under `programs`, or `not_run`, the reason}."""
  rows: dict[str, dict[str, Any]] = {}
  shapes = dataclasses.asdict(w) | {"length": w.group_size, "expert": EXPERT, "topology": topology}
  with tempfile.TemporaryDirectory() as folder:
    storage.write_json(os.path.join(folder, "shapes.json"), shapes)
    for name in names:
      try:
        command = compile_command(name, folder, topology, say)
        say(f"{name}: compiling for {topology}; this can take minutes")
        environ = environment(PROGRAMS[name][1]) | chips.ENVIRONMENT
        printed = processes.run(command, 60 * MINUTES, environ, folder)
        rows[name] = figures(json.loads(printed.splitlines()[-1]))
      except UserError as e:
        rows[name] = {"not_run": str(e)}
  return rows


def compile_command(name: str, folder: str, topology: str, say: Callable[[str], None]) -> list[str]:
  """The command that compiles. Raises UserError if its environment cannot be made."""
  kind, layer = PROGRAMS[name]
  if kind == "ours":
    chips.need_libtpu(topology)
  python = environments.python_of(kind, say)
  script, peer = HERE / "compile_layer.py", HERE / f"layer_{layer}.py"
  return [python, "-P", str(script), str(peer), folder, topology]


def figures(answer: dict[str, Any]) -> dict[str, Any]:
  """Per chip, from what `compile_layer.py` prints and the program's text; a chip is one device."""
  text = pathlib.Path(answer["text"]).read_text(encoding="utf-8")
  sent: dict[str, float] = {}
  for c in hlo.collectives(text, answer["devices"]):
    sent[c.kind] = sent.get(c.kind, 0.0) + c.sent / 2**20
  b = answer["bytes"]
  held = b["argument"] + b["output"] - b["alias"] + b["temp"] + b["generated_code"]
  exchanged = sum(mib for kind, mib in sent.items() if kind.endswith("all-to-all"))
  return {"peak_gib": held / 2**30, "temporaries_gib": b["temp"] / 2**30, "sent_mib": sum(sent.values()),
          "exchanged_mib": exchanged, "sent_mib_by_kind": sent, "compiler_tflops": answer["flops"] / 1e12,
          "compile_seconds": answer["seconds"], "versions": answer["versions"]}
