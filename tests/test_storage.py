"""What is written is whole, and on the disk or in the store; the same of a folder and of an address."""

import contextlib
import json
import os
import pathlib
import time
import uuid

import fsspec
import numpy as np
import pytest

from sparse_experts import errors, full_disk, storage
from sparse_experts.errors import UserError
from sparse_experts.storage import logs, requests
from tests import full_disk as disks
from tests.store import names, slow

# The verbs


def test_what_is_written_is_read(place):
  storage.make_folders(f"{place}/a")
  content = bytes(range(256)) * 3 + b"\r\n--\n"
  storage.write(f"{place}/a/b", content)
  assert storage.read(f"{place}/a/b") == content
  storage.write(f"{place}/a/b", "é")
  storage.write_json(f"{place}/c d[1]", {"a": 1})
  assert storage.read(f"{place}/a/b") == "é".encode()
  assert json.loads(storage.read(f"{place}/c d[1]")) == {"a": 1}
  assert storage.names(place) == ["a", "c d[1]"] and storage.names(f"{place}/a") == ["b"]
  assert [storage.is_folder(f"{place}/{x}") for x in ("", "a", "a/b", "x")] == [True, True, False, False]
  assert [storage.exists(f"{place}/{name}") for name in ("a", "a/b", "b")] == [True, True, False]
  assert storage.facts(f"{place}/a/b") == storage.Facts(2, True, False) and storage.facts(place).is_folder
  storage.write(f"{place}/a/b", "other")
  with storage.open_file(f"{place}/a/b") as f:
    assert list(f) == [b"other"]


def test_an_address_of_another_kind():
  """Of any that fsspec knows: files and data, no runs."""
  place = f"memory://bucket/{uuid.uuid4().hex}"
  storage.check_out(f"{place}/x.html", "--out")
  for name in ("a", "b/c"):
    storage.write(f"{place}/{name}", name)
  assert names(place) == ["a", "b"] and storage.read(f"{place}/b/c") == b"b/c"
  assert storage.is_folder(f"{place}/b") and not storage.exists(f"{place}/d")
  storage.rename(f"{place}/b", f"{place}/d")
  with storage.cached(place) as folder:
    assert sorted(os.listdir(folder)) == ["a", "d"] and pathlib.Path(folder, "d", "c").read_bytes() == b"b/c"
  storage.remove_folder(place)
  assert not names(place)
  with pytest.raises(UserError, match="runs are kept in folders and at gs:// addresses"):
    storage.check_keeps_runs(place, "w")


def test_what_is_not_there(place):
  for ask in (storage.read, storage.facts, storage.names, storage.remove, storage.open_file):
    with pytest.raises(FileNotFoundError) as caught:
      ask(f"{place}/none")
    assert caught.value.filename == f"{place}/none" and caught.value.strerror
  storage.write(f"{place}/a", "")
  with pytest.raises(NotADirectoryError):
    storage.names(f"{place}/a")
  assert storage.read(f"{place}/a") == b""


def test_renamed_and_removed(place):
  storage.make_folders(f"{place}/4/state")
  for name in ("state/x", "meta", "commit_success.txt"):
    storage.write(f"{place}/4/{name}", name)
  storage.rename(f"{place}/4", f"{place}/damaged-4")
  assert names(place) == ["damaged-4"] and storage.read(f"{place}/damaged-4/state/x") == b"state/x"
  storage.rename(f"{place}/damaged-4/meta", f"{place}/damaged-4/meta2")
  assert names(f"{place}/damaged-4") == ["commit_success.txt", "meta2", "state"]
  with storage.fetched(f"{place}/damaged-4") as folder:
    assert sorted(os.listdir(folder)) == ["commit_success.txt", "meta2", "state"]
    assert pathlib.Path(folder, "state", "x").read_bytes() == b"state/x"
  storage.remove_folder(f"{place}/damaged-4")
  assert not names(place)


def test_what_says_that_a_folder_is_complete_goes_first_and_comes_last(bucket, store):
  for name in ("a", "commit_success.txt", "z/b"):
    storage.write(f"{bucket}/4/{name}", name)
  storage.rename(f"{bucket}/4", f"{bucket}/5")
  begun = len(store.requests())
  storage.remove_folder(f"{bucket}/5")
  removed = [url.rpartition("5%2F")[2] for url in store.requests()[begun:] if url.startswith("DELETE")]
  assert removed[0] == "commit_success.txt" and sorted(removed[1:]) == ["a", "z%2Fb"]
  copied = [url.rpartition("5%2F")[2] for url in store.requests()[:begun] if "/rewriteTo/" in url][-3:]
  assert copied[-1] == "commit_success.txt" and sorted(copied[:-1]) == ["a", "z%2Fb"]


def test_a_block_that_fails_leaves_what_was_there(place):
  storage.write(f"{place}/a", "old")
  with pytest.raises(ZeroDivisionError), storage.create(f"{place}/a") as f:
    f.write(b"new")
    raise ZeroDivisionError
  assert storage.read(f"{place}/a") == b"old" and names(place) == ["a"]


def test_a_log_is_what_was_flushed_whoever_ended(place, monkeypatch):
  """Two writers after one another, of which the first was killed; the second keeps one line."""
  monkeypatch.setattr(logs, "INTERVAL", 1e9)
  path = f"{place}/metrics.jsonl"
  read = lambda: b"".join(map(storage.read, storage.log_parts(path)))
  log = storage.open_log(path, b"")
  for line in (b"1\n", b"2\n", b"3\n"):
    log.write(line)
    log.flush()
    assert read().endswith(line)
  assert read() == b"1\n2\n3\n"
  second = storage.open_log(path, b"1\n")
  assert read() == b"1\n"
  second.write(b"4\n")
  second.flush()
  second.close()
  assert read() == b"1\n4\n" and storage.log_parts(path) == [path] and names(place) == ["metrics.jsonl"]
  third = storage.open_log(path, read())
  third.write(b"5\n")
  third.flush()
  assert read() == b"1\n4\n5\n"
  third.close()
  log.write(b"lost\n")
  with contextlib.suppress(OSError):  # the first notices that it lost the log, and writes nothing more
    log.close()
  assert read() == b"1\n4\n5\n" and storage.log_parts(path) == [path]


def test_a_log_of_objects(bucket, store, monkeypatch):
  monkeypatch.setattr(logs, "MOST", 4)
  monkeypatch.setattr(logs, "INTERVAL", 1e9)
  monkeypatch.setattr(requests, "PATIENCE", 0.0)
  path = f"{bucket}/metrics.jsonl"
  log = storage.open_log(path, b"0\n")
  for i in range(1, 10):  # more than a series has objects
    log.write(b"%d\n" % i)
    log.flush()
  assert len(storage.log_parts(path)) <= 4
  with storage.fetched(bucket) as copy:  # of a run that was killed: a folder
    assert b"".join(map(storage.read, storage.log_parts(f"{copy}/metrics.jsonl"))).splitlines() == [
        b"%d" % i for i in range(10)]
    storage.open_log(f"{copy}/metrics.jsonl", b"7\n").close()
    assert storage.names(copy) == ["metrics.jsonl"]
  with store.harmed({"fault": "403"}):
    log.write(b"10\n")
    with pytest.raises(PermissionError):
      log.flush()
    with pytest.raises(PermissionError):  # until it is stored
      log.write(b"11\n")
  monkeypatch.setattr(logs, "INTERVAL", 0.0)
  with pytest.raises(PermissionError):
    log.write(b"12\n")  # which begins to store it
  until = time.monotonic() + 10
  while log._waiting:
    assert time.monotonic() < until
    time.sleep(0.01)
  log.write(b"13\n")
  log.close()
  assert storage.read(path).splitlines() == [b"%d" % i for i in range(14)]


def test_a_log_that_is_written_anew_while_it_is_read(bucket):
  path, found = f"{bucket}/metrics.jsonl", []
  storage.open_log(path, b"1\n2\n")

  def read(parts):
    if not found:
      storage.open_log(path, b"1\n")  # a run that is resumed
    found.append(parts)
    return b"".join(map(storage.read, parts))

  assert storage.steadily(path, read, b"none") == b"1\n" and len(found) == 2
  assert storage.steadily(f"{bucket}/none", read, b"none") == b"none"


# Addresses


@pytest.mark.parametrize("spelt, same", [
    ("gs://bucket/a/", "gs://bucket/a"), ("gs://bucket//a//b", "gs://bucket/a/b"),
    ("gs://bucket/", "gs://bucket"), ("gs://bucket/my run", "gs://bucket/my run")])
def test_an_address_however_it_is_spelt(spelt, same):
  assert storage.absolute(spelt) == same and storage.is_address(spelt)


def test_a_slash_at_the_end_names_the_same_objects(bucket):
  storage.write(f"{bucket}/my run//a", "x")
  assert storage.names(f"{bucket}/my run/") == ["a"] and storage.read(f"{bucket}//my run/a") == b"x"


@pytest.mark.parametrize("path, message", [
    ("gs:/bucket/run", "w looks like an address with a slash too few; write gs://bucket/run, or ./gs:/b"),
    ("file:///tmp/run", "w is of this machine; write the path alone, without file://"),
    ("gs://", "w names no bucket; write gs://BUCKET/NAME"),
    ("gs:////", "w names no bucket; write gs://BUCKET/NAME"),
    ("gs://my bucket/run", "w: no bucket is called 'my bucket'; names have small letters, digits"),
    ("gs://Bucket", "w: no bucket is called 'Bucket'"),
    ("s3://bucket/run", "w: runs are kept in folders and at gs:// addresses; give one of these, or mount"),
])
def test_what_is_no_place_for_a_run(path, message):
  with pytest.raises(UserError, match=message):
    storage.check_keeps_runs(path, "w")


@pytest.mark.parametrize("path", ["./gs://bucket", "runs/a", "/gs/bucket/run", "a:b", "runs/gs:/x", "://x"])
def test_paths_of_this_machine(path):
  assert not storage.is_address(path)
  storage.check_keeps_runs(path, "w")


@pytest.mark.parametrize("address, message", [
    ("gs://nobucket/run", "w: there is no bucket 'nobucket'; make it, or mend its name"),
    ("gs://closed/run", r"w cannot be written \(no rights there: .*\); give this account the right to read"),
])
def test_a_bucket_that_takes_nothing(store, address, message):
  with pytest.raises(UserError, match=message):
    storage.prepare(address, "w")


def test_a_kind_of_address_that_is_not_installed(monkeypatch):
  requests.store_of.cache_clear()
  with pytest.raises(UserError, match="s3:// addresses need a package that is not installed: Install s3fs"):
    storage.read("s3://bucket/a")
  with pytest.raises(UserError, match="nothing:// is no kind of address that fsspec knows; write gs://BUCKET"):
    storage.read("nothing://bucket/a")

  def missing(_):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr("fsspec.filesystem", missing)
  with pytest.raises(UserError, match=r"gs:// addresses need a package that is not installed.*; pip install "
                                      r"'sparse_experts\[gcs\]'"):
    storage.read("gs://bucket/a")
  requests.store_of.cache_clear()


# A store that is out of order


@pytest.mark.parametrize("fault", ["503", *slow("429", "half an answer", "no answer", "half an upload")])
def test_a_request_that_fails_is_repeated(bucket, store, fault):
  storage.write(f"{bucket}/a", "x" * 1000)
  with store.harmed({"fault": fault, "times": 1}):
    storage.write(f"{bucket}/a", "y" * 1000)
  assert storage.read(f"{bucket}/a") == b"y" * 1000
  if fault.startswith("half"):
    with store.harmed({"fault": fault, "times": 1}):
      assert storage.read(f"{bucket}/a") == b"y" * 1000


@pytest.mark.slow
def test_a_store_that_does_not_answer(bucket, store, monkeypatch):
  monkeypatch.setattr(requests, "PATIENCE", 0.0)
  monkeypatch.setattr(requests, "SILENCE", 0.3)
  monkeypatch.delitem(fsspec.config.conf, "gcs", raising=False)
  requests.store_of.cache_clear()
  try:
    with store.harmed({"fault": "hang"}), pytest.raises(OSError, match="the store does not answer") as caught:
      storage.read(f"{bucket}/a")
    assert caught.value.filename == f"{bucket}/a"
  finally:
    requests.store_of.cache_clear()
    fsspec.config.conf.pop("gcs")


@pytest.mark.parametrize("fault, words", [("403", "no rights there"), ("401", "the credentials do not hold")])
def test_what_the_credentials_may_not_do(bucket, store, fault, words):
  with store.harmed({"fault": fault}), pytest.raises(PermissionError, match=words):
    storage.read(f"{bucket}/a")


# Written means on the disk


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


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
  path = str(tmp_path / "a.json")
  storage.write_json(path, {"a": 1})
  disks.fill(monkeypatch)
  with pytest.raises(OSError, match="No space left") as caught:
    storage.write_json(path, {"a": 2})
  assert caught.value.filename == path
  with pytest.raises(OSError, match="No space left") as caught:
    full_disk.mapped(str(tmp_path / "array"), "float32", (2, 3))
  assert caught.value.filename == str(tmp_path / "array")
  assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
  assert not (tmp_path / "a.json.tmp").exists()


def test_a_full_disk_is_one_line_and_nothing_else_is_called_so(tmp_path, capsys):
  def save():
    with full_disk.naming("runs/x"):
      raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")

  assert errors.exit_code(save) == 2
  assert capsys.readouterr().err == (
      "error: no space left on the disk of runs/x; make room and run the same command again\n")
  with pytest.raises(FileNotFoundError):
    errors.exit_code((tmp_path / "none").read_text)


def test_a_mapped_file_is_an_array(tmp_path):
  array = full_disk.mapped(str(tmp_path / "array"), np.float32, (2, 3))
  assert array.shape == (2, 3) and not array.any() and (tmp_path / "array").stat().st_blocks > 0


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
