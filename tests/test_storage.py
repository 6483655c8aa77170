"""What is written is whole and on the disk."""

import json
import os

import pytest

from sparse_experts import storage


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
  path = str(tmp_path / "a.json")
  storage.write_json(path, {"a": 1})
  with pytest.raises(KeyboardInterrupt), storage.create(path) as f:
    f.write(b'{"a": 2')
    raise KeyboardInterrupt
  assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
  storage.write(path, "é")
  assert (tmp_path / "a.json").read_bytes() == "é".encode()
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def disk(tmp_path, monkeypatch):
  """The order of calls: ("flush" | "move" | "remove", path below the test's folder); flushes by any name."""
  calls = []
  shown = lambda path: os.path.relpath(os.path.realpath(path), os.path.realpath(tmp_path))

  def record(name, word, path_of):
    real = getattr(os, name)

    def call(*args, **keys):
      calls.append((word, shown(path_of(*args))))
      return real(*args, **keys)

    monkeypatch.setattr(os, name, call)

  record("fsync", "flush", lambda place: os.readlink(f"/proc/self/fd/{place}"))
  for name in ("replace", "rename"):
    record(name, "move", lambda path, target: target)
  return calls


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name(tmp_path, disk):
  storage.write(str(tmp_path / "a"), "x")
  assert disk == [("flush", "a.tmp"), ("move", "a"), ("flush", ".")]


def test_a_tree_is_flushed_from_the_leaves_to_the_root(tmp_path, disk):
  storage.make_folders(str(tmp_path / "a" / "b"))
  assert disk == [("flush", "."), ("flush", "a")]
  (tmp_path / "a" / "b" / "c").write_text("x")
  disk.clear()
  storage.flush_tree(str(tmp_path / "a"))
  assert disk == [("flush", "a/b/c"), ("flush", "a/b"), ("flush", "a")]


def test_a_disk_that_loses_what_is_written_leaves_the_old_file(tmp_path, monkeypatch):
  storage.write(str(tmp_path / "a"), "old")

  def lost(_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(os, "fsync", lost)
  with pytest.raises(OSError, match="Input/output"):
    storage.write(str(tmp_path / "a"), "new")
  assert (tmp_path / "a").read_text() == "old"
