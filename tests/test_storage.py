"""A file is there whole or as it was."""

import json

import numpy as np
import pytest

from sparse_experts import errors, storage
from tests import full_disk


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
  path = str(tmp_path / "a.json")
  storage.write_json(path, {"a": 1})
  with pytest.raises(KeyboardInterrupt), storage.create(path) as f:
    f.write(b'{"a": 2')
    raise KeyboardInterrupt
  assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
  storage.write(path, "é")
  assert (tmp_path / "a.json").read_bytes() == "é".encode()
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
  path = str(tmp_path / "a.json")
  storage.write_json(path, {"a": 1})
  full_disk.fill(monkeypatch)
  with pytest.raises(OSError, match="No space left") as caught:
    storage.write_json(path, {"a": 2})
  assert caught.value.filename == path
  with pytest.raises(OSError, match="No space left") as caught:
    storage.mapped(str(tmp_path / "array"), "float32", (2, 3))
  assert caught.value.filename == str(tmp_path / "array")
  assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
  assert not (tmp_path / "a.json.tmp").exists()


def test_a_full_disk_is_one_line_and_nothing_else_is_called_so(tmp_path, capsys):
  def save():
    with storage.naming("runs/x"):
      raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")

  assert errors.exit_code(save) == 2
  assert capsys.readouterr().err == (
      "error: no space left on the disk of runs/x; make room and run the same command again\n")
  with pytest.raises(FileNotFoundError):
    errors.exit_code((tmp_path / "none").read_text)


def test_a_mapped_file_is_an_array(tmp_path):
  array = storage.mapped(str(tmp_path / "array"), np.float32, (2, 3))
  assert array.shape == (2, 3) and not array.any() and (tmp_path / "array").stat().st_blocks > 0
