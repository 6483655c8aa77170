"""Numbers of the page: rounded for the blob, and in words for tables."""

import math
from collections.abc import Iterable
from typing import Any


def rounded(values: Iterable[float | None], digits: int = 5) -> list[float | None]:
  """Values with that many significant digits; None for what is no finite number, which JSON lacks."""
  return [one(value, digits) for value in values]


def one(value: float | None, digits: int = 5) -> float | None:
  if value is None or not math.isfinite(value):
    return None
  return float(f"{value:.{digits}g}")


def exact(value: float | None) -> float | None:
  """All digits, for figures that are rounded once, where they are shown."""
  return None if value is None or not math.isfinite(value) else float(value)


def number(value: Any, digits: int = 4) -> str:
  """1234567 -> 1,234,567; 0.012345 -> 0.01234; None -> an en dash."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return "–"
  if isinstance(value, str | bool):
    return str(value)
  if not math.isfinite(value):
    return str(value)
  if float(value).is_integer() and abs(value) < 1e15:
    return f"{int(value):,}"
  text = f"{value:.{digits}g}"
  if "e" in text:
    return text
  return f"{value:,.0f}" if abs(value) >= 1000 else text


def percent(value: float | None, digits: int = 1) -> str:
  """With `digits` behind the point, and one more where that would show next to nothing."""
  if value is None or not math.isfinite(value):
    return "–"
  return f"{100 * value:.{digits + (0 < abs(value) < 0.01 and digits > 0)}f}%"


def loss(value: float | None) -> str:
  return "–" if value is None else f"{value:.4f}"


def short(value: float | None) -> str:
  """Four digits and a unit: 1234567 -> 1.235M."""
  if value is None:
    return "–"
  for unit in ("", "k", "M", "G", "T", "P"):
    if abs(value) < 1000:
      return f"{value:.4g}{unit}"
    value /= 1000
  return f"{value:.4g}E"


def clock(seconds: float | None) -> str:
  """41 s, 12 min, 3 h 20 min."""
  if seconds is None:
    return "–"
  if seconds < 100:
    return f"{seconds:.0f} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
