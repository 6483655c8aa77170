"""Folders of small text files, for data.source='files:FOLDER'."""

import pathlib
from collections.abc import Iterable


def write_texts(folder: pathlib.Path, texts: Iterable[bytes]) -> None:
  """Makes the folder, with a numbered .txt file of each text."""
  folder.mkdir()
  for i, text in enumerate(texts):
    (folder / f"{i}.txt").write_bytes(text)


def functions(repeats: int = 12) -> list[bytes]:
  """Twenty texts: a line of code again and again, another one in each."""
  return [f"def f{i}(x):\n  return x + {i}\n".encode() * repeats for i in range(20)]
