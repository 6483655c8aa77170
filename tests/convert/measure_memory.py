"""Peak memory of `convert` in both directions on a made-up Mixtral checkpoint.

    python tests/convert/measure_memory.py DIR [--layers=4]

Prints one JSON object, in MiB: the largest tensor in float32, all tensors, and how far anonymous memory (what
the system cannot drop; pages of mapped files it can) rose above what it was before, reading and writing.
"""

import json
import pathlib
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np

from sparse_experts.convert.files import write_tensors
from sparse_experts.convert.read import read
from sparse_experts.convert.write import write

MIB = 2**20
VOCAB, E = 8192, 8


def make(folder, layers, D=1024, F=3584):
  """Writes the checkpoint in bfloat16; its tensors' sizes in float32."""
  folder.mkdir(parents=True)
  config = dict(
      model_type="mixtral", vocab_size=VOCAB, hidden_size=D, intermediate_size=F, num_hidden_layers=layers,
      num_attention_heads=16, num_key_value_heads=4, num_local_experts=E, num_experts_per_tok=2)
  shapes = {"model.embed_tokens.weight": (VOCAB, D), "lm_head.weight": (VOCAB, D), "model.norm.weight": (D,)}
  for i in range(layers):
    own = f"model.layers.{i}."
    for name in ("input_layernorm", "post_attention_layernorm"):
      shapes[f"{own}{name}.weight"] = (D,)
    for letter, width in (("q", D), ("k", D // 4), ("v", D // 4), ("o", D)):
      shapes[f"{own}self_attn.{letter}_proj.weight"] = (width, D)
    shapes[f"{own}block_sparse_moe.gate.weight"] = (E, D)
    for e in range(E):
      for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
        shapes[f"{own}block_sparse_moe.experts.{e}.{name}.weight"] = shape
  dtype, rng = jnp.dtype("bfloat16"), np.random.default_rng(0)
  write_tensors(str(folder), {name: (dtype, shape) for name, shape in shapes.items()},
                lambda name: rng.standard_normal(shapes[name], np.float32).astype(dtype), 100 * MIB)
  (folder / "config.json").write_text(json.dumps(config))
  return [4 * int(np.prod(shape)) for shape in shapes.values()]


def anonymous():
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def rise(work):
  """How far anonymous memory rises while `work` runs."""
  before = peak = anonymous()
  done = threading.Event()

  def watch():
    nonlocal peak
    while not done.is_set():
      peak = max(peak, anonymous())
      time.sleep(0.005)

  watcher = threading.Thread(target=watch)
  watcher.start()
  work()
  done.set()
  watcher.join()
  return peak - before


def measure(folder, layers):
  hf, run, out = (folder / name for name in ("hf", "run", "out"))
  sizes = make(hf, layers)
  warm = folder / "warm"  # starts jax, orbax and their threads
  make(warm, 1, 64, 64)
  read(str(warm), str(folder / "warm_run"))
  found = {"largest": max(sizes), "all": sum(sizes), "read": rise(lambda: read(str(hf), str(run))),
           "write": rise(lambda: write(str(run), str(out), "mixtral", dtype="bfloat16"))}
  return {name: round(value / MIB) for name, value in found.items()}


if __name__ == "__main__":
  flags = dict(word.removeprefix("--").split("=") for word in sys.argv[2:])
  print(json.dumps(measure(pathlib.Path(sys.argv[1]), int(flags.get("layers", 4)))))
