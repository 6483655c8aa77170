"""A short plain text of a run for a bug report."""

import platform
from importlib import metadata
from typing import Any

from sparse_experts import version
from sparse_experts.report.layers import FIGURES
from sparse_experts.report.log import LOGGED
from sparse_experts.report.numbers import number, percent

PACKAGES = ("jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
FACTS = ("data hash", "measure", "mesh", "device", "versions it was trained with", "step time")
SHOWN_KEYS, SHOWN_LAYERS, LONGEST = 30, 8, 120


def versions() -> dict[str, str]:
  """Of the package, Python and the libraries, none of which is imported."""
  found = version.versions()
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = "not installed"
  return found | {"platform": platform.platform(terse=True)}


def text(runs: list[dict[str, Any]], comparison: dict[str, Any] | None, here: dict[str, str]) -> str:
  """What the button copies."""
  lines = []
  for run in runs[:4]:
    lines += [*_run(run), ""]
  if len(runs) > 4:
    lines += [f"and {len(runs) - 4} more runs", ""]
  if comparison:
    lines.append(f"final {comparison['unit']}, paired differences to {comparison['baseline']}:")
    lines += ["  " + "  ".join(row) for row in comparison["table"]["rows"]]
    lines.append("")
  lines.append("here: " + ", ".join(f"{name} {number}" for name, number in here.items()))
  return "\n".join(lines)


def _run(run: dict[str, Any]) -> list[str]:
  lines = [f"run {run['name']}: {run['state']}, step {number(run['step'])} of {number(run['steps'])}, "
           f"seed {run['seed']}"]
  lines += [f"  {tile['label']}: {tile['value']} ({tile['detail']})" for tile in run.get("tiles", ())]
  layers = run.get("layers", ())
  for layer in layers[:SHOWN_LAYERS]:
    parts = []
    for figure in LOGGED:
      there = [v for v in layer["series"][figure] or [] if v is not None]
      if there:
        title, unit, _ = FIGURES[figure]
        parts.append(f"{title} {percent(there[-1]) if unit == '%' else number(there[-1], 3)}")
    lines.append(f"  {layer['name']}, {layer['experts']} experts: {', '.join(parts) or 'nothing logged'}")
  if len(layers) > SHOWN_LAYERS:
    lines.append(f"  and {len(layers) - SHOWN_LAYERS} more sparse layers")
  facts = dict(run.get("facts", ()))
  lines += [f"  {name}: {facts[name]}" for name in FACTS if name in facts]
  changed = [row for row in run.get("config", ()) if row["differs"]]
  lines.append("  config, where it differs from the default: " + (", ".join(
      f"{row['key']}={row['value'][:LONGEST]}" for row in changed[:SHOWN_KEYS]) or "nowhere")
      + (f" and {len(changed) - SHOWN_KEYS} more" if len(changed) > SHOWN_KEYS else ""))
  lines += [f"  note: {note}" for note in run.get("notes", ())]
  return lines
