"""A file is there whole or as it was."""

import json

import pytest

from sparse_experts import storage


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
