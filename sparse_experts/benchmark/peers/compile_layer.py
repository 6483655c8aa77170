"""Compiles one peer's layer for TPU chips that need not be there: a script for the peer's own environment.

compile_layer.py FILE FOLDER TOPOLOGY: FILE has `lower(shapes, devices)`, forward and
backward of the layer. The program's text is saved in FOLDER; a line of JSON says where, with the compiler's
bytes and FLOPs per device, and versions.
"""

import json
import os
import pathlib
import runpy
import sys
import time
from importlib import metadata

from jax.experimental import topologies


def main(file: str, folder: str, topology: str) -> None:
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  where = pathlib.Path(folder)
  shapes = json.loads((where / "shapes.json").read_text(encoding="utf-8"))
  devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  start, peer = time.perf_counter(), runpy.run_path(file)
  dump = where / str(os.getpid())
  # libtpu writes the text itself: jax's `as_text` fails on some of its programs.
  compiled = peer["lower"](shapes, devices).compile(
      compiler_options={"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True})
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  facts = {name: getattr(memory, f"{name}_size_in_bytes") for name in (
      "argument", "output", "alias", "temp", "generated_code")}
  texts = list(dump.glob("*after_optimizations.txt"))
  if not texts:  # a libtpu that writes none
    texts = [where / f"{os.getpid()}.txt"]
    texts[0].write_text(compiled.as_text(), encoding="utf-8")
  print(json.dumps({
      "text": str(texts[0]), "bytes": facts, "flops": cost.get("flops"), "devices": len(devices),
      "seconds": time.perf_counter() - start,
      "versions": {name: metadata.version(name) for name in (*peer["PACKAGES"], "libtpu")}}),
      file=answers, flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
