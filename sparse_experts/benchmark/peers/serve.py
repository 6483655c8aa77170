"""Times one peer's layer: a script for the peer's own environment, where this package may not be.

serve.py FILE FOLDER VARIANT: FILE has `make(shapes, arrays, variant)` -> (layer, floor, results, dropped):
two functions that run forward and backward to completion, one that gives the output and the gradient of the
input, and the share of assignments that are dropped. FOLDER has the shapes and arrays.
It prints a line of JSON when the layer is ready, and one for each line that it reads: `check` saves the
results, `round` times floor and layer. stdout is for these lines: what libraries print goes to stderr.
"""

import json
import os
import pathlib
import runpy
import sys
import time
from collections.abc import Callable
from importlib import metadata

import numpy as np


def main(file: str, folder: str, variant: str) -> None:
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)

  def answer(**facts):
    print(json.dumps(facts), file=answers, flush=True)

  where = pathlib.Path(folder)
  shapes = json.loads((where / "shapes.json").read_text(encoding="utf-8"))
  arrays = {path.stem: np.load(path) for path in where.glob("*.npy")}
  peer = runpy.run_path(file)
  layer, floor, results, dropped = peer["make"](shapes, arrays, variant)
  floor(), layer()  # compiled, and as warm as in a later round
  versions = {name: metadata.version(name) for name in peer["PACKAGES"]}
  answer(versions=versions, dropped=dropped)
  for line in sys.stdin:
    if line.strip() == "check":
      y_TD, dx_TD = results()
      path = where / f"{os.getpid()}.npz"
      np.savez(path, y_TD=y_TD, dx_TD=dx_TD)
      answer(path=str(path))
    else:
      answer(floor_ms=milliseconds(floor), layer_ms=milliseconds(layer))


def milliseconds(run: Callable[[], object]) -> float:
  start = time.perf_counter()
  run()
  return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
  main(*sys.argv[1:])
