"""What becomes of other libraries' layers, with workers that stand in for them; nothing is downloaded."""

import importlib.util
import json
import os
import pathlib
import sys
import time

import pytest

from sparse_experts import cli
from sparse_experts.benchmark.layer import Workload
from sparse_experts.benchmark.peers import environments, layers, processes, programs
from sparse_experts.errors import UserError
from tests.training.test_measures import undefined

TINY = Workload(64, 16, 32, 4, 2, "swiglu", group_size=32)
# Answers as serve.py does. KIND: `differs` by 0.1, `drops` as well, `dies` in the second round.
WORKER = """
import json, os, sys
import numpy as np
name, folder, kind, factor = sys.argv[1:]
print(json.dumps({"versions": {"numpy": "1"}, "dropped": 0.25 if kind == "drops" else 0.0}), flush=True)
rounds = 0
for line in sys.stdin:
  if line.strip() == "check":
    y = np.ones((4, 2)) + 0.1 * (kind in ("differs", "drops"))
    np.savez(os.path.join(folder, name + ".npz"), y_TD=y, dx_TD=np.ones((4, 2)))
    print(json.dumps({"path": os.path.join(folder, name + ".npz")}), flush=True)
    continue
  rounds += 1
  if kind == "dies" and rounds == 2:
    raise MemoryError("no room")
  if kind == "killed":
    os.kill(os.getpid(), 9)
  with open(os.environ["ORDER"], "a") as f:
    print(name, os.getpid(), file=f)
  print(json.dumps({"layer_ms": rounds * float(factor), "floor_ms": rounds * 2.0}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """Makes `serve` start stand-ins: {name: (kind, milliseconds of its layer in the first round)}."""
  script = tmp_path / "worker.py"
  script.write_text(WORKER)
  monkeypatch.setenv("ORDER", str(tmp_path / "order"))
  monkeypatch.setattr(layers, "PAUSE", 0)

  def use(peers):
    def serve(name, folder, say):
      kind, factor = peers[name]
      if kind == "missing":
        raise UserError("python -m pip: No matching distribution found for peer")
      return [sys.executable, str(script), name, folder, kind, str(factor)]

    monkeypatch.setattr(layers, "PEERS", dict.fromkeys(peers, ("ours", "")))
    monkeypatch.setattr(layers, "serve", serve)
    return tmp_path / "order"

  return use


def test_rounds_alternate_and_ratios_are_of_one_round(stand_in):
  """The second round is twice as slow for all: ratios do not see it."""
  order = stand_in({layers.OURS: ("", 3), "b": ("", 8), "c": ("drops", 2)})
  rows = layers.measure(TINY, 3, ("b", "c"))
  names = [line.split()[-2] for line in order.read_text().splitlines()]
  assert names == ["ragged", "b", "c", "c", "b", "ragged", "ragged", "b", "c"]
  assert list(rows) == [layers.OURS, "b", "c"]
  b = rows["b"]
  assert (b["layer_ms"], b["own_floor_ms"], b["over_own_floor"], b["over_our_floor"]) == (16, 4, 4, 4)
  assert b["over_our_floor_quartiles"] == [4, 4] and b["difference"] == 0
  assert rows["c"]["dropped"] == 0.25 and rows["c"]["difference"] == pytest.approx(0.1)


def test_what_cannot_be_measured_is_a_row_with_its_reason(stand_in):
  stand_in({layers.OURS: ("", 3), "a": ("missing", 1), "b": ("differs", 1), "c": ("dies", 1), "d": ("", 1),
            "e": ("killed", 1)})
  said = []
  rows = layers.measure(TINY, 2, ("a", "b", "c", "d", "e"), said.append)
  assert rows["a"] == {"not_run": "python -m pip: No matching distribution found for peer"}
  assert rows["b"]["not_run"] == "its results differ from ours by 1.0e-01 of the largest, more than 1e-05"
  assert rows["c"] == {"not_run": "MemoryError: no room"}
  assert rows["d"]["over_own_floor"] == 0.5
  assert rows["e"] == {"not_run": "ended by SIGKILL; memory may be short"}
  assert said[-1] == "round 2 of 2"


def test_without_ours_there_is_nothing_to_compare(stand_in):
  stand_in({layers.OURS: ("dies", 3), "b": ("", 1)})
  with pytest.raises(UserError, match="ours, ragged: MemoryError: no room"):
    layers.measure(TINY, 2, ("b",))


def test_an_interrupt_ends_the_workers(stand_in):
  order = stand_in({layers.OURS: ("", 3), "b": ("", 1)})

  def press(line):
    if line == "round 1 of 2":
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    layers.measure(TINY, 2, ("b",), press)
  for line in order.read_text().splitlines():
    assert not os.path.exists(f"/proc/{line.split()[-1]}")


@pytest.mark.slow
def test_our_rows_are_one_layer(monkeypatch):
  """The scripts themselves: without drops `einsum` gives what `ragged` gives."""
  monkeypatch.setitem(layers.PEERS, "roomy", ("ours", "einsum 2.0"))
  row = layers.measure(TINY, 1, ("roomy",))["roomy"]
  assert row["dropped"] == 0 and 0 < row["difference"] < layers.TOLERANCE and row["over_own_floor"] > 0
  assert "jax" in row["versions"]


def test_an_environment_is_used_once_it_is_complete(tmp_path, monkeypatch):
  """pip fails the first time: it is asked again, and then no more."""
  monkeypatch.setitem(environments.ENVIRONMENTS, "empty", environments.Environment(("peer==1",)))
  calls, said, environ = [], [], {"XDG_CACHE_HOME": str(tmp_path)}

  def run(command, seconds, environ):
    calls.append(command[1:])
    os.makedirs(tmp_path / "sparse_experts/peers" / command[-1], exist_ok=True)
    if len(calls) == 2:
      raise UserError("python -m pip: No matching distribution found for peer==1")

  monkeypatch.setattr(processes, "run", run)
  with pytest.raises(UserError, match="No matching distribution"):
    environments.python_of("empty", said.append, environ)
  inside = environments.python_of("empty", said.append, environ)
  assert environments.python_of("empty", said.append, environ) == inside
  assert [call[:2] for call in calls] == [["-m", "venv"], ["-m", "pip"]] * 2
  assert calls[-1][-1] == "peer==1" and len(said) == 2 and "empty: installing peer==1" in said[0]
  assert inside.startswith(str(tmp_path))


def test_a_command_that_fails_says_why():
  code = "import sys; sys.exit('WARNING: old\\nERROR: No wheel')"
  with pytest.raises(UserError, match="-c .*: No wheel"):
    processes.run([sys.executable, "-c", code], 600, os.environ)


def test_variables_that_are_for_our_libraries_stay_here(monkeypatch):
  """jax sets the first when it is imported; another jax would load our libtpu."""
  for name in ("TPU_LIBRARY_PATH", "XLA_FLAGS", "PYTHONPATH", "OMP_NUM_THREADS"):
    monkeypatch.setenv(name, "ours")
  monkeypatch.setenv("HTTPS_PROXY", "all")
  peers, ours = layers.environment("maxtext"), layers.environment("ours")
  assert "ours" not in peers.values() and peers["HTTPS_PROXY"] == "all" and "PYTHONPATH" not in peers
  assert os.path.isdir(os.path.join(ours["PYTHONPATH"], "sparse_experts"))


def test_a_python_that_is_missing_is_named(tmp_path):
  shim = tmp_path / "python9.9"
  shim.write_text("#!/bin/sh\nexit 127\n")
  shim.chmod(0o755)
  with pytest.raises(UserError, match="it needs Python 9.9 and there is no python9.9 on the PATH"):
    environments.find_python("9.9", {"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path)})


def test_a_command_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
  code = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
  with pytest.raises(UserError, match="sh -c .* took more than 1 s"):
    processes.run(["/bin/sh", "-c", code], 1, os.environ)
  status = pathlib.Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
  until = time.monotonic() + 5
  while status.exists() and " Z " not in status.read_text() and time.monotonic() < until:
    time.sleep(0.01)
  assert not status.exists() or " Z " in status.read_text()  # dead, if nobody has collected it


@pytest.mark.parametrize("log, reason", [
    ("Traceback:\n  File\njax.JaxRuntimeError: RESOURCE\nmore\n", "jax.JaxRuntimeError: RESOURCE"),
    ("WARNING: old\nERROR: Ignored\nERROR: No wheel\n", "No wheel"), ("killed\n", "killed"),
    ("", "ended with code 9")])
def test_reasons(log, reason):
  assert processes.reason(log, 9) == reason
  assert processes.reason(log, -9) == "ended by SIGKILL; memory may be short"


HLO = """HloModule jit_f

ENTRY %main (x: f32[1048576]) -> f32[1048576] {
  %x = f32[1048576]{0} parameter(0)
  ROOT %y = f32[1048576]{0} all-reduce(%x), replica_groups={}, to_apply=%sum
}
"""


def test_figures_of_a_program_by_hand(tmp_path):
  """Four devices sum 4 MiB in a ring: each sends 2 * 3 / 4 of it."""
  (tmp_path / "text").write_text(HLO)
  sizes = {"argument": 2**30, "output": 2**30, "alias": 2**29, "temp": 2**29, "generated_code": 0}
  found = programs.figures({"text": str(tmp_path / "text"), "devices": 4, "bytes": sizes, "flops": 3e12,
                            "seconds": 5.0, "versions": {}})
  assert (found["peak_gib"], found["temporaries_gib"], found["compiler_tflops"]) == (2, 0.5, 3)
  assert found["sent_mib_by_kind"] == {"all-reduce": 6}
  assert (found["sent_mib"], found["exchanged_mib"]) == (6, 0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_our_program_is_compiled(monkeypatch):
  """Each of 8 chips sends its rows, [128, 256] in bfloat16, four times; or there is a reason."""
  monkeypatch.setattr(programs, "EXPERT", 4)
  monkeypatch.setitem(environments.ENVIRONMENTS, "maxtext", environments.Environment((), "9.9"))
  tiny = Workload(8 * 64, 256, 256, 4, 2, "swiglu", group_size=64, dtype="bfloat16")
  rows = programs.measure(tiny, ("ours", "MaxText"), "v5e:2x4")
  assert rows["ours"]["sent_mib_by_kind"]["ragged-all-to-all"] == 4 * 128 * 256 * 2 * 3 / 4 / 2**20
  assert "it needs Python 9.9" in rows["MaxText"]["not_run"]


def test_table_and_json(monkeypatch, capsys):
  times = dict.fromkeys(("layer_ms", "own_floor_ms", "over_own_floor", "over_our_floor"), 2.0)
  times |= {f"{name}_quartiles": [1.0, 3.0] for name in times}
  layer = times | {"dropped": 0.0, "difference": 3e-7, "versions": {"jax": "1", "numpy": "2"}}
  program = {"peak_gib": 8.0, "temporaries_gib": 4.0, "sent_mib": 1.0, "sent_mib_by_kind": {"send": 1.0},
             "exchanged_mib": 0.0, "compiler_tflops": 69.3, "compile_seconds": 15.0,
             "versions": {"libtpu": "3"}}
  failed = {"not_run": "it needs Python 3.12"}
  monkeypatch.setattr(layers, "measure", lambda w, runs, say: {"ours, ragged": layer, "MaxText": failed})
  monkeypatch.setattr(programs, "measure", lambda w, say: {"ours": program, "MaxText": failed})
  assert cli.main(["benchmark", "peers", "--json"]) == 0
  out = capsys.readouterr().out
  assert "4096 tokens, d 512, 8 experts of hidden 1792 (swiglu), top-2, float32, 9 rounds" in out
  assert "ours, ragged" in out and "MaxText       not run: it needs Python 3.12\njax 1, numpy 2\n" in out
  assert "v5p:4x4x4: 262144 tokens" in out and "libtpu 3" in out
  found = json.loads(out.splitlines()[-1])
  assert found["layers"]["MaxText"] == failed and found["programs"]["ours"] == program
  assert not undefined({*layer, *program, "not_run"} - {"versions"})


@pytest.mark.parametrize("arguments, message", [
    (["--workload=switch"], "--workload=switch is unknown; known: mixtral_8x7b, mixtral_small"),
    (["--dispatch=ragged"], "--dispatch is for benchmark layer; leave it out of benchmark peers"),
    (["--config.train.steps=3"], "benchmark peers reads no config")])
def test_mistakes(arguments, message, capsys):
  assert cli.main(["benchmark", "peers", *arguments]) == 2
  assert message in capsys.readouterr().err
