"""How the verbs print numbers for people: tables, and numbers of four digits."""

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(rows: Iterable[Sequence[Any]]) -> str:
  """Columns as wide as their widest cell; from the third on, to the right."""
  cells = [[str(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return "\n".join("  ".join(
      cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(
          row, widths, strict=True))).rstrip() for row in cells)


def wrapped(rows: Iterable[Sequence[str]], widths: Sequence[int]) -> list[str]:
  """The lines of a table of texts, each cell wrapped to its column's width."""
  lines = []
  for row in rows:
    cells = [textwrap.wrap(cell, width, break_on_hyphens=False)
             for cell, width in zip(row, widths, strict=True)]
    lines += ["  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
              for parts in itertools.zip_longest(*cells, fillvalue="")]
  return lines


def figures(what: str, columns: Sequence[tuple[str, str]],
            rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
  """The rows of a table, one per item; columns: (heading, format of the item's figures, such as "{k}")."""
  return [(what, *(heading for heading, _ in columns)), *(
      (name, *(form.format_map(row) for _, form in columns)) for name, row in rows.items())]


def short(number: float, units: Sequence[str] = ("", "k", "M", "G", "T"), step: int = 1000) -> str:
  """Four digits and a unit: 1234567 -> 1.235M."""
  *smaller, largest = units
  for unit in smaller:
    if abs(number) < step:
      return f"{number:.4g}{unit}"
    number /= step
  return f"{number:.4g}{largest}"
