"""A place is one process's at a time: a folder by a file, an address by an object."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from sparse_experts import storage
from sparse_experts.errors import UserError
from sparse_experts.storage import LEASE, Holder, generations
from tests.store import names, slow

leases = sys.modules["sparse_experts.storage.lease"]  # `storage.lease` is its function


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
  when = lambda: generations.look(path)[1] if storage.is_address(place) else os.stat(path).st_mtime_ns
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
