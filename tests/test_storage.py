"""What is written is whole and on the disk; a folder is one process's at a time."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from sparse_experts import errors, full_disk, storage
from sparse_experts.errors import UserError
from sparse_experts.storage import LEASE, RENEW, STALE, Holder
from tests import full_disk as disks

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


# One process per folder


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


def take(folder, clock, me=None, said=None):
  said = [] if said is None else said
  return storage.lease(str(folder), "workdir w", said.append, me, clock.now, clock.sleep, renew=1000.0)


def other(**keys):
  """A process of another host."""
  return dataclasses.replace(Holder("far", "boot 1", 77, "5", "token"), **keys)


def leave(folder, holder, content=None):
  """A lease that nobody renews."""
  text = json.dumps(dataclasses.asdict(holder)) if content is None else content
  (folder / LEASE).write_text(text)
  return folder / LEASE


def test_a_second_holder_is_refused_at_once_and_told_who(tmp_path, clock):
  with take(tmp_path, clock):
    message = rf"workdir w is in use by process {os.getpid()} on host \S+; wait until it ends, or choose"
    with pytest.raises(UserError, match=message), take(tmp_path, clock):
      pass
    assert clock.time == 0
  with take(tmp_path, clock):
    assert (tmp_path / LEASE).exists()
  assert not list(tmp_path.iterdir())


def test_an_error_in_the_block_frees_the_folder(tmp_path, clock):
  with pytest.raises(ZeroDivisionError), take(tmp_path, clock):
    raise ZeroDivisionError
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gone", [
    dict(process=2**22 + 1, started="5"),  # no such process
    dict(process=os.getpid(), started="5"),  # its number is another's by now
])
def test_a_dead_process_of_this_machine_frees_the_folder_at_once(tmp_path, clock, gone):
  leave(tmp_path, dataclasses.replace(Holder.here(), **gone))
  with take(tmp_path, clock, said=(said := [])):
    assert clock.time == 0 and not said


def test_a_killed_process_that_nobody_waits_for_is_dead(tmp_path, clock):
  process = subprocess.Popen(["sleep", "100"])
  holder = dataclasses.replace(Holder.here(), process=process.pid, started=storage._started(process.pid))
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
def test_any_other_holder_has_a_minute_for_a_sign_of_life(tmp_path, clock, holder, content):
  leave(tmp_path, holder, content)
  with take(tmp_path, clock, said=(said := [])):
    assert STALE <= clock.time <= STALE + 2
  who = "another process" if content is not None else str(holder)
  message = f"workdir w is in use by {who} or was left by it; waiting up to 60 seconds for a sign of life"
  assert said == [message]


def test_a_sign_of_life_from_another_host_refuses(tmp_path, clock):
  path = leave(tmp_path, other())
  clock.at[RENEW] = lambda: os.utime(path, (1, 1))  # its clock may say anything
  with pytest.raises(UserError, match="in use by process 77 on host far"), take(tmp_path, clock):
    pass
  assert clock.time == RENEW and json.loads(path.read_text())["host"] == "far"


def test_a_holder_that_ends_while_another_waits(tmp_path, clock):
  path = leave(tmp_path, other())
  clock.at[20.0] = path.unlink
  with take(tmp_path, clock):
    assert clock.time == 20


def test_of_two_that_wait_one_is_refused(tmp_path, clock):
  path = leave(tmp_path, other())

  def quicker():
    path.unlink()
    leave(tmp_path, other(process=78, token="new"))

  clock.at[STALE - 1] = quicker
  with pytest.raises(UserError, match="process 78 on host far"), take(tmp_path, clock):
    pass


def test_a_lease_that_is_no_longer_the_stale_one_is_put_back(tmp_path):
  """The other of two was quicker between the last look and the removal."""
  stale = storage._look(str(leave(tmp_path, other())))
  leave(tmp_path, other(process=78, token="new"))
  storage._remove(str(tmp_path / LEASE), stale, Holder.here())
  assert json.loads((tmp_path / LEASE).read_text())["process"] == 78
  assert [p.name for p in tmp_path.iterdir()] == [LEASE]


def test_a_copy_of_a_folder_in_use_is_free_after_a_minute(tmp_path, clock):
  """Its lease names a process of this machine that lives, but nobody renews it."""
  path = leave(tmp_path, Holder.here())
  os.utime(path, (1, 1))
  with take(tmp_path, clock):
    assert STALE <= clock.time <= STALE + 2


def test_a_holder_that_was_silent_too_long_learns_that_it_lost(tmp_path, clock):
  with take(tmp_path, clock) as held:
    held.check()
    (tmp_path / LEASE).unlink()
    leave(tmp_path, other())
    message = "workdir w is now that of process 77 on host far; this process saves no more and ends"
    with pytest.raises(UserError, match=message):
      held.check()
  assert json.loads((tmp_path / LEASE).read_text())["process"] == 77  # not removed by the loser
  (tmp_path / LEASE).unlink()
  with take(tmp_path, clock) as held:
    (tmp_path / LEASE).unlink()
    with pytest.raises(UserError, match="workdir w has lost its lease.json"):
      held.check()


def test_a_thread_gives_the_signs_of_life(tmp_path):
  with storage.lease(str(tmp_path), "workdir w", print, renew=0.01):
    os.utime(tmp_path / LEASE, (1, 1))
    until = time.monotonic() + 10
    while (tmp_path / LEASE).stat().st_mtime < 2:
      assert time.monotonic() < until
      time.sleep(0.005)


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


def test_real_processes_and_a_kill(tmp_path):
  """The second is refused while the first lives, and goes on at once when it was killed."""
  def start():
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, text=True,
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
  assert third.returncode == 0 and not list(tmp_path.iterdir())
  for process in (first, second):
    process.communicate()
