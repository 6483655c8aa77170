"""Real processes, one per simulated host: they feed, train, save, resume and stop together."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from sparse_experts import cli, peers, processes
from sparse_experts.errors import UserError
from sparse_experts.results import read_result
from sparse_experts.training.run import load

ROOT = pathlib.Path(__file__).parents[2]
# 24 rows, 24 groups and 12 experts divide over eight devices and over six.
SIZES = dict(train__batch_size=24, model__num_experts=12, eval__train_windows=24, eval__min_bytes=700)
FOREVER = dict(train__steps=10**6, train__eval_every=10**6, train__checkpoint_every=10**6)
SCRIPT = """
import sys, time
from sparse_experts import peers, processes
from sparse_experts.data import Dataset
from sparse_experts.errors import UserError
peers.LOST = {lost}
processes.join()
import jax
from tests.training.tiny import tiny_train
get, silent_from = Dataset.__getitem__, {silent_from}
def silent(self, i):
  if i >= silent_from and jax.process_index() == 1:
    time.sleep(1000)
  return get(self, i)
Dataset.__getitem__ = silent
try:
  with processes.ending():
    tiny_train({workdir!r}, **{keys!r})
except UserError as e:
  print(e, file=sys.stderr)
  processes.leave(2)
"""


def free_address():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture
def start(compiled_programs, tmp_path):
  """start(count, devices, workdir, keys): processes whose stderr is in the returned files.

  other: keys of the last process that are not those of the others; `workdir` among them.
  """
  running = []

  def start(count, devices, workdir, silent_from=10**9, lost=30, other=None, **keys):
    address = free_address()
    made = []
    for i in range(count):
      own = dict(workdir=workdir) | (other or {} if i == count - 1 else {})
      folder = str(own.pop("workdir"))
      script = SCRIPT.format(workdir=folder, keys=SIZES | keys | own, silent_from=silent_from, lost=lost)
      env = os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled_programs, "PYTHONPATH": str(ROOT),
                          "JAX_NUM_CPU_DEVICES": str(devices)}
      if count > 1:
        env |= dict(zip(processes.NAMES, (address, str(count), str(i)), strict=True))
      log = tmp_path / f"{len(running)}.log"
      with log.open("w") as f:
        made.append((subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=env, stderr=f), log))
      running.append(made[-1][0])
    return made

  yield start
  for process in running:
    with contextlib.suppress(ProcessLookupError):
      process.kill()
    process.wait()


def run(made):
  codes = [process.wait(timeout=300) for process, _ in made]
  assert not any(codes), [log.read_text()[-2000:] for _, log in made]


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(workdir, step, made):
  until = time.monotonic() + 200
  while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < step:
    assert time.monotonic() < until and all(p.poll() is None for p, _ in made), made[0][1].read_text()[-2000:]
    time.sleep(0.02)


@pytest.mark.slow
def test_saved_by_two_resumed_by_three_and_by_one(start, tmp_path):
  """Hosts change three times, and the losses are those of one process with eight devices."""
  run(start(1, 8, tmp_path / "whole", train__steps=6, mesh__data=2, mesh__expert=4))
  parts = tmp_path / "parts[x=0] *?"  # orbax looks for each process's files by a pattern
  run(start(2, 4, parts, train__steps=2, mesh__data=2, mesh__expert=4))
  run(start(3, 2, parts, train__steps=4, mesh__data=3, mesh__expert=2))
  run(start(1, 1, parts, train__steps=6))
  losses = [[(row["step"], row["loss"]) for row in rows(folder) if "loss" in row]
            for folder in (tmp_path / "whole", parts)]
  assert [step for step, _ in losses[1]] == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(*losses, rtol=1e-5)  # sums in another order
  whole, found = load(str(tmp_path / "whole"), config=None), load(str(parts))
  assert whole.step == found.step == 6


@pytest.mark.slow
def test_a_slice_loses_a_host_and_comes_back_with_three(start, tmp_path):
  """One of two processes is killed between two saves; three go on, on another mesh, with the same losses."""
  keys = dict(train__steps=8, train__checkpoint_every=3)
  run(start(1, 1, tmp_path / "whole", **keys))
  parts = tmp_path / "parts"
  made = start(2, 4, parts, **keys, mesh__data=2, mesh__expert=4, lost=12, silent_from=24 * 6)  # of step 7
  wait_for_step(parts, 6, made)  # it waits for the data of step 7
  made[1][0].kill()
  assert made[0][0].wait(timeout=60) == 2
  assert "error: process 1 of 2 gave no sign of life for 12 seconds" in made[0][1].read_text()
  saved = max(int(path.name) for path in (parts / "checkpoints").iterdir() if path.name.isdecimal())
  assert saved in (3, 6)  # the second may not be whole
  made = start(3, 2, parts, **keys, mesh__data=3, mesh__expert=2)
  run(made)
  assert f"resuming {parts} at step {saved}" in made[0][1].read_text()
  losses = [[(row["step"], row["loss"]) for row in rows(folder) if "loss" in row]
            for folder in (tmp_path / "whole", parts)]
  assert [step for step, _ in losses[1]] == [*range(1, 9)]
  np.testing.assert_allclose(*losses, rtol=1e-5)  # sums in another order
  whole, found = (read_result(str(folder)) for folder in (tmp_path / "whole", parts))
  assert whole.finished and found.finished


@pytest.mark.slow
def test_saved_by_two_in_a_store_resumed_by_one(start, bucket, tmp_path):
  keys = dict(train__steps=4, mesh__data=2, mesh__expert=4)
  run(start(1, 8, tmp_path / "whole", **keys))
  run(start(2, 4, bucket, **keys | dict(train__steps=2)))
  run(start(1, 8, bucket, **keys))
  whole, found = read_result(str(tmp_path / "whole")), read_result(bucket)
  losses = [[(row["step"], row["loss"]) for row in of.rows if "loss" in row] for of in (whole, found)]
  assert [step for step, _ in losses[1]] == [1, 2, 3, 4] and found.finished
  np.testing.assert_allclose(*losses, rtol=1e-5)  # sums in another order
  assert load(bucket).step == 4


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both_at_one_step(start, tmp_path):
  workdir = tmp_path / "run"
  made = start(2, 4, workdir, **FOREVER, mesh__data=2, mesh__expert=4)
  wait_for_step(workdir, 3, made)
  made[1][0].send_signal(signal.SIGTERM)
  assert [process.wait(timeout=300) for process, _ in made] == [143, 143]  # as `train` in Python ends
  (checkpoint,) = (workdir / "checkpoints").iterdir()
  assert int(checkpoint.name) >= 3
  assert f"SIGTERM: saved at step {checkpoint.name}; the same command" in made[0][1].read_text()
  made = start(2, 4, workdir, **FOREVER, mesh__data=2, mesh__expert=4)
  wait_for_step(workdir, int(checkpoint.name) + 1, made)
  assert f"resuming {workdir} at step {checkpoint.name}" in made[0][1].read_text()


@pytest.mark.slow
def test_a_process_without_data_is_named_and_the_other_does_not_wait_for_ever(start, tmp_path):
  made = start(2, 4, tmp_path / "run", **FOREVER, mesh__data=2, mesh__expert=4, silent_from=72,
               train__input_timeout=5.0)
  assert [process.wait(timeout=200) for process, _ in made] == [2, 2]
  line = "process 1 of 2 waited 5 seconds for the data of step 4; see what"
  assert all(line in log.read_text() for _, log in made)


@pytest.mark.slow
@pytest.mark.parametrize("other, line", [
    (dict(optimizer__learning_rate=0.5), "optimizer.learning_rate is 0.5 there and 0.01 in process 0"),
    (dict(workdir="elsewhere"), "the workdir is 'not that of process 0, but /"),
], ids=["config", "workdir"])
def test_processes_that_differ_end_with_the_line_that_names_it(other, line, start, tmp_path):
  if "workdir" in other:
    other = dict(workdir=tmp_path / "elsewhere")
  made = start(2, 4, tmp_path / "run", **FOREVER, mesh__data=2, mesh__expert=4, other=other)
  assert [process.wait(timeout=200) for process, _ in made] == [2, 2]
  for _, log in made:
    assert "process 1 of 2 differs: " in log.read_text() and line in log.read_text(), log.read_text()
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dies, line", [
    (1, "process 1 of 2 gave no sign of life for 6 seconds; see the log there, and start all again"),
    (0, "process 0 of 2, which serves the others, is gone; see its log, and start all again")])
def test_the_others_end_soon_after_one_that_was_killed(dies, line, start, tmp_path):
  made = start(2, 4, tmp_path / "run", **FOREVER, mesh__data=2, mesh__expert=4, lost=6)
  wait_for_step(tmp_path / "run", 2, made)
  made[dies][0].kill()
  process, log = made[1 - dies]
  assert process.wait(timeout=60) == 2
  assert log.read_text().splitlines()[-1].startswith(f"error: {line}")


@pytest.fixture
def tpu_host(monkeypatch):
  """A machine with TPU chips; what jax is asked to join is in the returned list."""
  for name in processes.NAMES:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(processes, "_has_tpu", lambda: True)
  monkeypatch.setattr(processes, "_watch", lambda: None)
  asked = []
  monkeypatch.setattr("jax.distributed.initialize", lambda *args, **keys: asked.append((args, keys)))
  return asked


def test_on_a_tpu_host_jax_finds_the_others(tpu_host):
  processes.join()
  ((args, timeouts),) = tpu_host
  assert args == () and timeouts["heartbeat_timeout_seconds"] > peers.LOST  # ours come first
  assert timeouts["initialization_timeout"] > peers.COME


def test_processes_that_are_named_come_first_on_a_tpu_host(tpu_host, monkeypatch):
  for name, value in zip(processes.NAMES, ("127.0.0.1:99", "2", "1"), strict=True):
    monkeypatch.setenv(name, value)
  processes.join()
  assert [args for args, _ in tpu_host] == [("127.0.0.1:99", 2, 1)]


def test_a_tpu_host_without_others_says_so(tpu_host, monkeypatch, capsys):
  def nobody(**_):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr("jax.distributed.initialize", nobody)
  processes.join()
  assert "jax finds no other TPU hosts (coordinator_address" in capsys.readouterr().err


def test_a_machine_without_tpu_asks_nobody(tpu_host, monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("asked"))
  processes.join()


def test_verbs_that_compute_wait_for_the_others_and_the_rest_for_nobody(monkeypatch, capsys):
  def join():
    raise UserError("joined")

  monkeypatch.setattr(processes, "join", join)
  assert cli.main(["describe", "--routers"]) == 0
  assert cli.main(["evaluate", "--workdir=nowhere"]) == 2 and "joined" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("index, line", [
    (0, "process 0 of 2: not all others have come within 1 seconds; start the same command"),
    (1, "process 1 of 2: process 0, which serves the others at 127.0.0.1:1, has not come within")])
def test_a_process_that_never_comes_is_waited_for_so_long(index, line):
  code = "from sparse_experts import peers, processes; peers.COME = 1; processes.join()"
  address = ("127.0.0.1:1", free_address())[index == 0]
  env = os.environ | dict(zip(processes.NAMES, (address, "2", str(index)), strict=True))
  found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
  assert found.returncode == 2 and line in found.stderr.splitlines()[-1]


@pytest.mark.parametrize("env, message", [
    (("127.0.0.1:99", "2", ""), "JAX_COORDINATOR_ADDRESS is set but JAX_PROCESS_ID is not; a run of several"),
    (("127.0.0.1", "2", "1"), "JAX_COORDINATOR_ADDRESS=127.0.0.1 has no port; write host:port of process 0"),
    (("127.0.0.1:99", "2", "2"), "JAX_PROCESS_ID=2 is out of range; with JAX_NUM_PROCESSES=2 choose 0 to 1"),
    (("127.0.0.1:99", "two", "1"), "JAX_NUM_PROCESSES='two' is not a whole number; give one"),
])
def test_an_environment_that_names_no_process(env, message, monkeypatch):
  for name, value in zip(processes.NAMES, env, strict=True):
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=message):
    processes.join()
