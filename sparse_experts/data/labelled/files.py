"""Labelled texts from .csv, .tsv, .json and .jsonl, or a .txt of lines for each label; also .gz and .zip."""

import csv
import io
import json
import logging
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sparse_experts.data.files import members
from sparse_experts.data.text.files import utf8
from sparse_experts.errors import UserError

TEXT = ("text", "sentence")  # names of a column or a field
LABEL = ("label", "category", "intent", "class")
HELD_OUT = ("valid", "validation", "val", "dev", "test")  # names of parts, the first that is there counts
PARTS = ("train", *HELD_OUT)

Row = tuple[str, str]  # text, label
_KINDS = ".csv, .tsv, .json or .jsonl of texts and labels, or a .txt of lines for each label"


def read(path: str) -> tuple[list[dict] | types.SimpleNamespace, tuple[str, ...]]:
  """(labelled texts, ()) of a file, a folder or a .zip: {"text": str, "label": name}.

  A table has two columns, or a header that names them (`TEXT`, `LABEL`). Where files begin with, or a JSON
  object names, `train` and one of `HELD_OUT`, these are the two parts; what is neither is left out, which is
  logged. Files of other kinds are not read.
  """
  what = f"data.source='files:{path}'"
  parts: dict[str, list[Row]] = {}
  for outer, inner, data, name in members(path, f"a {_KINDS}"):
    file = (outer + inner)[-1].removesuffix(".gz")
    stem, _, kind = file.rpartition(".")
    if kind.lower() not in READERS:
      continue
    named = (*outer[:-1], *inner[:-1], *([] if kind.lower() == "txt" else [stem]))  # of .txt it is the label
    part = next((p for p in PARTS for word in named if word.lower().startswith(p)), "")
    for key, rows in READERS[kind.lower()](utf8(data, name).decode(), stem, f"data.source='{name}'"):
      parts.setdefault(key or part, []).extend(rows)
  if not any(parts.values()):
    raise UserError(f"{what} holds no labelled texts; give a {_KINDS}")
  held_out = next((p for p in HELD_OUT if p in parts), "")
  if "train" not in parts or not held_out:
    return [_item(row) for rows in parts.values() for row in rows], ()
  if left_out := sorted(parts.keys() - {"train", held_out}):
    logging.warning("%s: the parts %s are left out; train and %s are read", what,
                    ", ".join(name or "without a name" for name in left_out), held_out)
  return types.SimpleNamespace(**{name: list(map(_item, parts[of]))
                                  for name, of in (("train", "train"), ("valid", held_out))}), ()


def _item(row: Row) -> dict[str, str]:
  return dict(text=row[0], label=row[1])


def _csv(text: str, stem: str, name: str, **form: Any) -> Iterator[tuple[str, Iterable[Row]]]:
  try:
    lines = [line for line in csv.reader(io.StringIO(text), **form) if any(cell.strip() for cell in line)]
  except csv.Error as e:
    raise UserError(f"{name} is no table ({e}); mend it") from None
  header = [cell.strip().lower() for cell in lines[0]] if lines else []
  columns = [next((i for i, cell in enumerate(header) if cell in names), None) for names in (TEXT, LABEL)]
  if None not in columns:
    at, lines = [c for c in columns if c is not None], lines[1:]
  else:
    at = [0, 1]
  wide = max(at) + 1
  for i, line in enumerate(lines):
    if len(line) < wide or (None in columns and len(line) > wide):
      raise UserError(f"{name}: row {i} has {len(line)} columns; give two, text and label, or a header that "
                      f"names them {TEXT[0]} and {LABEL[0]}")
  yield "", [(line[at[0]], line[at[1]]) for line in lines]


def _json(text: str, stem: str, name: str) -> Iterator[tuple[str, Iterable[Row]]]:
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise UserError(f"{name} is no JSON ({e}); mend it") from None
  parts = found if isinstance(found, dict) else {"": found}
  for part, rows in parts.items():
    if not isinstance(rows, list):
      raise UserError(f"{name} has {type(rows).__name__} in place of rows; give a list of "
                      "[text, label]")
    yield part, [_row(row, i, name) for i, row in enumerate(rows)]


def _jsonl(text: str, stem: str, name: str) -> Iterator[tuple[str, Iterable[Row]]]:
  rows = []
  for i, line in enumerate(filter(str.strip, text.split("\n"))):
    try:
      rows.append(_row(json.loads(line), i, name))
    except (json.JSONDecodeError, RecursionError) as e:
      raise UserError(f"{name}: row {i} is no JSON ({e}); mend it") from None
  yield "", rows


def _row(row: Any, i: int, name: str) -> Row:
  if isinstance(row, dict):
    row = [next((row[key] for key in keys if key in row), None) for keys in (TEXT, LABEL)]
  text, label = row if isinstance(row, list) and len(row) == 2 else (None, None)
  if not isinstance(text, str) or not isinstance(label, str | int):
    raise UserError(f"{name}: row {i} is not a text and a label; give [text, label], or an object with "
                    f"'{TEXT[0]}' and '{LABEL[0]}'")
  return text, str(label)


def _lines(text: str, stem: str, name: str) -> Iterator[tuple[str, Iterable[Row]]]:
  """The label is the name of the file."""
  yield "", [(line.strip(), stem) for line in text.split("\n") if line.strip()]


READERS: dict[str, Callable[[str, str, str], Iterator[tuple[str, Iterable[Row]]]]] = {
    "csv": _csv, "tsv": lambda *args: _csv(*args, delimiter="\t", quoting=csv.QUOTE_NONE), "json": _json,
    "jsonl": _jsonl, "txt": _lines}
