"""What processes of a run tell each other, in one process: a server of values that is a dict."""

import threading

import pytest

from sparse_experts import peers, processes
from sparse_experts.errors import UserError
from sparse_experts.peers import LOST, Peers, difference, reason


class Server:
  """jax's client of the server of values, as far as it is used."""

  def __init__(self, count):
    self.values, self.arrived, self.count, self.changed = {}, {}, count, threading.Condition()

  def key_value_set(self, key, value, allow_overwrite=False):
    with self.changed:
      assert allow_overwrite or key not in self.values
      self.values[key] = value
      self.changed.notify_all()

  def key_value_dir_get(self, folder):
    with self.changed:
      return [(key, value) for key, value in self.values.items() if key.startswith(folder + "/")]

  def blocking_key_value_get(self, key, milliseconds):
    with self.changed:
      assert self.changed.wait_for(lambda: key in self.values, milliseconds / 1000)
      return self.values[key]

  def wait_at_barrier(self, name, milliseconds):
    with self.changed:
      self.arrived[name] = self.arrived.get(name, 0) + 1
      self.changed.notify_all()
      if not self.changed.wait_for(lambda: self.arrived[name] == self.count, milliseconds / 1000):
        raise RuntimeError("DEADLINE_EXCEEDED")


def together(of, count, server=None):
  """What of(peers) gives, or its UserError's text, in each of `count` processes at once."""
  server, found = server or Server(count), [None] * count

  def run(i):
    try:
      found[i] = of(Peers(server, i, count))
    except UserError as e:
      found[i] = str(e)

  threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return found


def test_equal_facts_pass_and_different_ones_end_all_with_the_same_line():
  assert together(lambda p: p.compare("x", {"a": 1, "b": (1, 2)}), 3) == [None] * 3
  (line,) = set(together(lambda p: p.compare("x", {"train.seed": 7 if p.index == 1 else 0, "b": 2}), 3))
  assert line == ("process 1 of 3 differs: train.seed is 7 there and 0 in process 0; start all processes by "
                  "the same command, with the same files")


def test_comparisons_follow_each_other_and_each_has_its_own_values():
  def run(p):
    p.compare("first", {"a": 1})
    text = p.of_first(f"from {p.index}")
    p.compare("second", {"a": 2})
    return text

  assert together(run, 2) == ["from 0", "from 0"]


@pytest.mark.parametrize("facts, starts", [
    ([dict(a=1), dict(a=2)], "process 1 of 2 differs: a is 2 there and 1 in process 0"),
    ([dict(a=2), dict(a=1), dict(a=1)], "process 0 of 3 differs: a is 2 there and 1 in process 1"),
    ([dict(a=1), dict(a=2), dict(a=1), dict(a=2), dict(a=1)], "processes 1, 3 of 5 differ: a is 2 there"),
    ([dict(a=1, b=1), dict(a=1)], "process 1 of 2 differs: b is unset there and 1 in process 0"),
    ([dict(a=None), dict(a="x" * 999)], "process 1 of 2 differs: a is 'xxx"),
    ([dict.fromkeys("abcdef", 0), dict.fromkeys("abcdef", 1)], "process 1 of 2 differs: " + ", ".join(
        f"{name} is 1 there and 0 in process 0" for name in "abcd") + " and 2 more; start all"),
])
def test_the_line_names_who_differs_from_most_and_in_what(facts, starts):
  assert difference(facts).startswith(starts)


def test_one_that_does_not_come_to_compare_is_named():
  server = Server(3)
  run = lambda p: p.index == 1 or p.compare("the data", {}, seconds=0.2)
  found = together(run, 3, server)
  assert found[0] == found[2] and found[0].startswith(
      "process 1 of 3 did not come to compare the data within 0.2 seconds; see its log")


def test_the_reason_to_end_is_another_process_that_ended_or_is_silent():
  alive, now = ({"beat": 9}, 100.0), 100.0 + LOST
  assert reason({0: alive, 1: alive}, now, 0, 2) is None
  differs = "process 1 of 2 differs: a"
  for message, line in (("no room", "process 1 of 2 ended: no room"), (differs, differs),
                        ("another process has it", "process 1 of 2 ended: another process has it")):
    assert reason({0: alive, 1: ({"ended": message}, now)}, now, 0, 2) == line
  assert reason({0: alive, 1: alive}, now + 1, 1, 2).startswith(
      f"process 0 of 2 gave no sign of life for {LOST} seconds; see the log there")
  assert reason({0: ({"beat": 1}, now), 1: alive}, now + 1, 1, 2) is None


def test_a_failure_is_told_and_an_end_of_ones_own_is_not(monkeypatch):
  server = Server(2)
  monkeypatch.setattr(processes, "_peers", Peers(server, 1, 2))
  with processes.ending():
    pass
  assert not server.values
  processes.leave(1)  # nothing was told: the process ends as it would alone
  with pytest.raises(UserError), processes.ending():
    raise UserError("no room")
  assert server.values == {"state/1": '{"ended": "no room"}'}


def test_alone_nothing_is_compared():
  assert processes.are_alone() and processes.is_first() and processes.of_first("a") == "a"
  processes.compare("x", lambda: pytest.fail("asked"))


def test_a_server_that_is_not_there_does_not_answer():
  assert not peers.answers("127.0.0.1:1") and not peers.answers("nonsense")
