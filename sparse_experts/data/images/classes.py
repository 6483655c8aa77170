"""Names of the classes that a classifier's head tells apart: for images what a tokenizer is for text."""

import hashlib
import json
from collections.abc import Sequence

from sparse_experts.errors import UserError

_START = b"classes "


class Classes:
  """Names of classes in the order of the head's rows; a head may have rows to spare."""

  name = "classes"

  def __init__(self, names: Sequence[str], rows: int | None = None):
    rows = len(names) if rows is None else rows
    if rows < len(names):
      raise UserError(f"data.image.classes={rows}, but the source has {len(names)} classes: label {rows}, "
                      f"'{names[rows]}', is outside the head; choose {len(names)} or more")
    self.names, self.vocab_size = tuple(names), rows

  def numbers(self, names: Sequence[str]) -> list[int]:
    """The row of each of a source's classes."""
    row = {name: i for i, name in enumerate(self.names)}
    if outside := [name for name in names if name not in row]:
      raise UserError(f"data.source has a class '{outside[0]}' that the head has no row for; its classes are "
                      f"{', '.join(self.names[:5])}{', ...' if len(self.names) > 5 else ''}")
    return [row[name] for name in names]

  def serialize(self) -> bytes:
    """What a run saves next to its checkpoints."""
    return _START + json.dumps({"rows": self.vocab_size, "names": self.names}).encode()

  @classmethod
  def read(cls, saved: bytes) -> "Classes":
    """What `serialize` wrote."""
    classes = json.loads(saved.removeprefix(_START))
    return cls(classes["names"], classes["rows"])

  @property
  def fingerprint(self) -> str:
    """The same for the same classes in the same rows."""
    return hashlib.sha256(self.serialize()).hexdigest()[:16]
