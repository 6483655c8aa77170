"""A sweep of two tiny arms on files of its own."""

from tests.texts import functions, write_texts

CONFIG = """
from sparse_experts.config import dense_twin
from tests.training.tiny import tiny_config

def get_config(arg=None):
  config = tiny_config().unlock()
  config.data.source, config.data.valid_share = "files:{text}", 0.3
  config.eval.min_bytes = 300
  return dense_twin(config) if arg == "dense" else config
"""
SWEEP = """
from sparse_experts.sweeps.sweep import Arm, Sweep

def get_sweep():
  return Sweep(arms={arms}, seeds={seeds}{more})
"""


def write_config(folder) -> str:
  """A config file, `:dense` its twin, and its text."""
  write_texts(folder / "text", functions(6))
  (folder / "tiny.py").write_text(CONFIG.format(text=folder / "text"))
  return str(folder / "tiny.py")


def write_sweep(folder, name="a", arms=("switch", "dense"), seeds="range(2)", more=""):
  """A sweep file; arms: names or {name: (spec's argument, overrides)}."""
  known = {"switch": ("", {}), "dense": (":dense", {})}
  arms = {arm: known[arm] for arm in arms} if isinstance(arms, tuple) else arms
  text = ", ".join(f"{arm!r}: Arm({str(folder / 'tiny.py') + spec!r}, {keys!r})"
                   for arm, (spec, keys) in arms.items())
  path = folder / f"{name}.py"
  path.write_text(SWEEP.format(arms="{" + text + "}", seeds=seeds, more=more))
  return str(path)
