"""Whether the slots of a model's experts hold an even load, which no balance loss can mend."""

from collections.abc import Mapping, Sequence

from sparse_experts.models.model import SparseLayer


def warning(layers: Mapping[str, SparseLayer]) -> str | None:
  """A line on the layers that drop assignments when all experts have the same load; None if all fit."""
  short: dict[tuple[int, int, int, int], list[str]] = {}
  for name, layer in layers.items():
    C, E, T, k = layer.capacity, layer.num_experts, layer.group_size * layer.num_heads, layer.k
    if C is not None and T * k > C * E:
      short.setdefault((C, E, T, k), []).append(name)
  if not short:
    return None
  each = (f"{some(names)}: k={k} needs {-(-T * k // E)} slots per expert in a group of {T}, there are {C},"
          f" so {1 - C * E / (T * k):.0%} of assignments are dropped"
          for (C, E, T, k), names in short.items())
  return (f"an even load does not fit: {'; '.join(each)}; raise the capacity, or set model.capacity_factor=0 "
          "(dropless)")


def some(names: Sequence[str], most: int = 3) -> str:
  """The names with commas between them; of many the first ones."""
  more = len(names) - most
  return ", ".join(names) if more <= 1 else f"{', '.join(names[:most])} and {more} more"
