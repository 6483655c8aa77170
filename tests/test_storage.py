"""What is written is whole and on the disk or in the store; a place is one process's at a time."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest

from sparse_experts import errors, full_disk, storage
from sparse_experts.errors import UserError
from sparse_experts.storage import LEASE, Holder, logs, objects
from tests import full_disk as disks

leases = sys.modules["sparse_experts.storage.lease"]  # `storage.lease` is its function


@pytest.fixture(params=["local", "gs"])
def place(request, tmp_path):
  """A folder, or an address, of this test's own: what is promised of one is promised of the other."""
  return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")


def names(place):
  try:
    return storage.names(place)
  except FileNotFoundError:
    return []


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
  with contextlib.suppress(OSError):  # the first notices that it lost the log, and writes nothing more
    log.close()
  assert read() == b"1\n4\n5\n" and storage.log_parts(path) == [path]


def test_a_log_of_objects(bucket, store, monkeypatch):
  monkeypatch.setattr(logs, "MOST", 4)
  monkeypatch.setattr(logs, "INTERVAL", 1e9)
  monkeypatch.setattr(objects, "PATIENCE", 0.0)
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
  objects._store.cache_clear()
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
  objects._store.cache_clear()


# A store that is out of order


def slow(*faults):
  """gcsfs waits a second or two before it asks again."""
  return [pytest.param(fault, marks=pytest.mark.slow) for fault in faults]


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
  monkeypatch.setattr(objects, "PATIENCE", 0.0)
  monkeypatch.setattr(objects, "SILENCE", 0.3)
  monkeypatch.delitem(fsspec.config.conf, "gcs", raising=False)
  objects._store.cache_clear()
  try:
    with store.harmed({"fault": "hang"}), pytest.raises(OSError, match="the store does not answer") as caught:
      storage.read(f"{bucket}/a")
    assert caught.value.filename == f"{bucket}/a"
  finally:
    objects._store.cache_clear()
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


# One process per place


class Clock:
  """Time that passes while somebody sleeps; what happens then is in `at`: {second: action}."""

  def __init__(self):
    self.time, self.at = 0.0, {}

  def now(self):
    return self.time

  def sleep(self, seconds):
    self.time += seconds
    for second in [s for s in self.at if s <= self.time]:
      self.at.pop(second)()


@pytest.fixture
def clock():
  return Clock()


@pytest.fixture
def stale(place, monkeypatch):
  """Seconds without a sign of life; fewer in a store, which is asked in each of them."""
  if storage.is_address(place):
    monkeypatch.setattr(leases, "STALE", 6.0)
  return leases.STALE


def take(place, clock, me=None, said=None):
  said = [] if said is None else said
  return storage.lease(str(place), "workdir w", said.append, me, clock.now, clock.sleep, renew=1000.0)


def other(**keys):
  """A process of another host."""
  return dataclasses.replace(Holder("far", "boot 1", 77, "5", "token"), **keys)


def leave(place, holder, content=None):
  """A lease that nobody renews."""
  text = json.dumps(dataclasses.asdict(holder)) if content is None else content
  storage.write(f"{place}/{LEASE}", text)


def left(place):
  return json.loads(storage.read(f"{place}/{LEASE}"))


def test_a_second_holder_is_refused_at_once_and_told_who(place, clock):
  with take(place, clock):
    message = rf"workdir w is in use by process {os.getpid()} on host \S+; wait until it ends, or choose"
    with pytest.raises(UserError, match=message), take(place, clock):
      pass
    assert clock.time == 0
  with take(place, clock):
    assert names(place) == [LEASE]
  assert not names(place)


def test_an_error_in_the_block_frees_the_folder(place, clock):
  with pytest.raises(ZeroDivisionError), take(place, clock):
    raise ZeroDivisionError
  assert not names(place)


@pytest.mark.parametrize("gone", [
    dict(process=2**22 + 1, started="5"),  # no such process
    dict(process=os.getpid(), started="5"),  # its number is another's by now
])
def test_a_dead_process_of_this_machine_frees_the_folder_at_once(place, clock, gone):
  leave(place, dataclasses.replace(Holder.here(), **gone))
  with take(place, clock, said=(said := [])):
    assert clock.time == 0 and not said


def test_a_killed_process_that_nobody_waits_for_is_dead(tmp_path, clock):
  process = subprocess.Popen(["sleep", "100"])
  holder = dataclasses.replace(Holder.here(), process=process.pid, started=leases._started(process.pid))
  assert holder.started and not holder.gone
  process.kill()
  until = time.monotonic() + 10
  while not holder.gone and time.monotonic() < until:
    time.sleep(0.01)
  assert holder.gone
  process.wait()


@pytest.mark.parametrize("holder, content", [
    (other(), None),
    (other(machine=""), None),  # a system that does not say
    (Holder.here(), "{"),  # killed while it wrote its name
    (Holder.here(), ""),
    (Holder.here(), "[1]"),
    (dataclasses.replace(Holder.here(), machine="before it was started again"), None),
])
def test_any_other_holder_has_a_minute_for_a_sign_of_life(place, clock, stale, holder, content):
  assert stale == 60 or storage.is_address(place)
  leave(place, holder, content)
  with take(place, clock, said=(said := [])):
    assert stale <= clock.time <= stale + 2
  who = "another process" if content is not None else str(holder)
  assert said == [f"workdir w is in use by {who} or was left by it; waiting up to {stale:.0f} seconds for a "
                  "sign of life"]


def test_a_sign_of_life_from_another_host_refuses(place, clock, stale):
  leave(place, other())

  def renew():  # its clock may say anything
    leave(place, other()) if storage.is_address(place) else os.utime(f"{place}/{LEASE}", (1, 1))

  clock.at[4.0] = renew
  with pytest.raises(UserError, match="in use by process 77 on host far"), take(place, clock):
    pass
  assert clock.time == 4 and left(place)["host"] == "far"


def test_a_holder_that_ends_while_another_waits(place, clock, stale):
  leave(place, other())
  clock.at[5.0] = lambda: storage.remove(f"{place}/{LEASE}")
  with take(place, clock):
    assert clock.time == 5


def test_of_two_that_wait_one_is_refused(place, clock, stale):
  leave(place, other())

  def quicker():
    storage.remove(f"{place}/{LEASE}")
    leave(place, other(process=78, token="new"))

  clock.at[stale - 1] = quicker
  with pytest.raises(UserError, match="process 78 on host far"), take(place, clock):
    pass


def test_a_lease_that_is_no_longer_the_stale_one_stays(place):
  """The other of two was quicker between the last look and the removal."""
  leave(place, other())
  of = (leases._Object if storage.is_address(place) else leases._File)(f"{place}/{LEASE}", Holder.here())
  stale = of.look()
  storage.remove(f"{place}/{LEASE}")
  leave(place, other(process=78, token="new"))
  of.remove(stale)
  assert left(place)["process"] == 78 and names(place) == [LEASE]


def test_a_copy_of_a_folder_in_use_is_free_after_a_minute(tmp_path, clock):
  """Its lease names a process of this machine that lives, but nobody renews it."""
  leave(tmp_path, Holder.here())
  os.utime(tmp_path / LEASE, (1, 1))
  with take(tmp_path, clock):
    assert leases.STALE <= clock.time <= leases.STALE + 2


def test_a_holder_that_was_silent_too_long_learns_that_it_lost(place, clock):
  with take(place, clock) as held:
    held.check()
    storage.remove(f"{place}/{LEASE}")
    leave(place, other())
    message = "workdir w is now that of process 77 on host far; this process saves no more and ends"
    with pytest.raises(UserError, match=message):
      held.check()
  assert left(place)["process"] == 77  # not removed by the loser
  storage.remove(f"{place}/{LEASE}")
  with take(place, clock) as held:
    storage.remove(f"{place}/{LEASE}")
    with pytest.raises(UserError, match="workdir w has lost its lease.json"):
      held.check()


def test_a_thread_gives_the_signs_of_life(place):
  path = f"{place}/{LEASE}"
  when = lambda: objects.look(path)[1] if storage.is_address(place) else os.stat(path).st_mtime_ns
  with storage.lease(place, "workdir w", print, renew=0.01):
    first, until = when(), time.monotonic() + 10
    while when() == first:
      assert time.monotonic() < until
      time.sleep(0.005)


@pytest.mark.parametrize("fault", ["no answer", *slow("503", "half an answer")])
def test_a_lease_is_held_whatever_answer_is_lost(bucket, clock, store, fault):
  """What was written although the answer was lost is one's own."""
  with store.harmed({"fault": fault, "times": 1, "match": "POST"}), take(bucket, clock) as held:
    assert store.harms()[fault] and clock.time == 0
    held.check()
    store.harm({"fault": fault, "times": 1, "match": "POST"})
    held.check()
  assert not names(bucket)


def test_a_store_without_an_answer_takes_no_lease_away(bucket, clock, store):
  with take(bucket, clock) as held:
    with store.harmed({"fault": "403"}):
      held.check()  # the save that follows tells
    held.check()


def test_a_lease_that_cannot_be_written(tmp_path, clock, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(json, "dumps", full)
  message = r"lease.json cannot be written \(No space left on device\); make room"
  with pytest.raises(UserError, match=message), take(tmp_path, clock):
    pass
  assert not list(tmp_path.iterdir())


_HOLD = """
import sys, time
from sparse_experts import storage
from sparse_experts.errors import UserError
try:
  with storage.lease(sys.argv[1], "workdir w", print):
    print("held", flush=True)
    sys.stdin.read()
except UserError as e:
  print(e, flush=True)
"""


def test_real_processes_and_a_kill(place):
  """The second is refused while the first lives, and goes on at once when it was killed."""
  def start():
    process = subprocess.Popen([sys.executable, "-c", _HOLD, place], stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[1])
    return process, process.stdout.readline()

  first, line = start()
  assert line == "held\n"
  second, line = start()
  assert f"in use by process {first.pid} on host" in line
  first.kill()
  third, line = start()  # nobody has waited for the first
  assert line == "held\n"
  third.communicate("")
  assert third.returncode == 0 and not names(place)
  for process in (first, second):
    process.communicate()
