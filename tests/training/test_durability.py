"""What a run survives, and what it says when it does not."""

import contextlib
import errno
import gc
import grp  # noqa: F401  orbax imports it late, when the user below may not read Python's own files
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import cli, partitioning
from sparse_experts.data import Dataset, make_tokenizer
from sparse_experts.data.feed import load as load_batch
from sparse_experts.errors import Stopped, UserError
from sparse_experts.models import build
from sparse_experts.training import interrupt, nonfinite
from sparse_experts.training.checkpoints import Checkpoints, meta
from sparse_experts.training.checkpoints.checksums import checksum
from sparse_experts.training.countdown import Countdown
from sparse_experts.training.metrics import JsonLines
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.run import load
from sparse_experts.training.session import NonFinite
from sparse_experts.training.state import TrainState, abstract_state
from tests.training.tiny import tiny_config, tiny_train

QUICK = dict(eval__train_windows=8, eval__min_bytes=200)


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def on_record(monkeypatch, action):
  """Calls `action(i)` before record i of the training data is read, which is when its step begins."""
  get = Dataset.__getitem__

  def read(self, i):
    if len(self) > 10**6:  # the endless stream
      action(i)
    return get(self, i)

  monkeypatch.setattr(Dataset, "__getitem__", read)
  monkeypatch.setattr("sparse_experts.training.setup.Feed", LazyFeed)


class LazyFeed:
  """Loads a batch when it is asked for it."""

  def __init__(self, dataset, batch_size, sharding, start, timeout):
    self.args, self.step = (dataset, batch_size, sharding), start

  def __next__(self):
    dataset, batch_size, sharding = self.args
    self.step += 1
    return load_batch(dataset, (self.step - 1) * batch_size, batch_size, sharding)

  def close(self):
    pass


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture
def half(whole, tmp_path):
  """A copy of the whole run with its checkpoints of steps 2 and 4, told to go on to step 6."""
  shutil.copytree(whole[0], tmp_path / "half")
  return tmp_path / "half"


@pytest.fixture(scope="module")
def abstract():
  """The state that `half` holds, on one device."""
  config = tiny_config()
  model = build(config, make_tokenizer("bytes").vocab_size)
  return abstract_state(model, make_optimizer(config, model.axes), partitioning.make_mesh(), False)


# Damage


def test_checksums_see_every_element_and_no_mesh():
  x = np.random.default_rng(0).normal(size=(6, 8, 4)).astype(np.float32)
  whole = int(checksum(jnp.asarray(x)))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data")))
  assert int(jax.jit(checksum)(spread)) == whole
  bits = x.view(np.uint32)
  expected = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits.ravel())) % 2**32
  assert whole == expected
  for at in [(0, 0, 0), (5, 7, 3), (2, 3, 1)]:
    for bit in (0, 31):
      other = bits.copy()
      other[at] ^= np.uint32(1 << bit)
      assert int(checksum(jnp.asarray(other.view(np.float32)))) != whole
  for kind in (jnp.bfloat16, jnp.int32, jnp.uint8, bool):
    y = jnp.asarray(np.arange(40) % 2).astype(kind)
    assert int(checksum(y)) != int(checksum(y.at[39].set(kind(0))))


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(bytes(content))


def _halve(path):
  os.truncate(path, path.stat().st_size // 2)


def _largest(folder, under="state"):
  return max((p for p in (folder / under).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "a flipped byte of the arrays": lambda step: _flip(_largest(step)),
    "a truncated file of the arrays": lambda step: _halve(_largest(step)),
    "a missing file of the arrays": lambda step: _largest(step).unlink(),
    "an empty file of meta": lambda step: os.truncate(step / "meta" / "metadata", 0),
    "a flipped byte of meta": lambda step: _flip(step / "meta" / "metadata"),
    "a missing manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "a missing folder": lambda step: shutil.rmtree(step / "state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_kept_aside(half, abstract, damage):
  DAMAGE[damage](half / "checkpoints" / "4")
  if "arrays" not in damage:  # what is hit may be the optimizer's, which nobody but training reads
    with pytest.raises(UserError, match=r"checkpoint .*/4 is damaged \(.+\); choose step 2"):
      load(str(half))
  told = []
  with Checkpoints(str(half / "checkpoints"), 3) as checkpoints:
    assert int(checkpoints.restore_newest(abstract, lambda meta: None, told.append).step) == 2
    assert checkpoints.steps() == [2]
  assert re.fullmatch(r"checkpoint .*/4 is damaged \(.+\); .*; kept aside as damaged-4", told[0]), told
  assert (half / "checkpoints" / "damaged-4").is_dir()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, half, capsys):
  DAMAGE["a flipped byte of the arrays"](half / "checkpoints" / "4")
  run = tiny_train(half)
  told = capsys.readouterr().err
  assert "kept aside as damaged-4\n" in told and f"resuming {half} at step 2" in told
  assert_same_bits(run.params, whole[1].params)
  assert [row["step"] for row in rows(half)] == [1, 2, 3, 4, 4]


def test_nothing_but_damaged_checkpoints_is_refused(half):
  for step in ("2", "4"):
    DAMAGE["a truncated file of the arrays"](half / "checkpoints" / step)
  with pytest.raises(UserError, match="holds damaged checkpoints only; bring back a whole one, or"):
    tiny_train(half)
  with pytest.raises(UserError, match="holds damaged checkpoints only"):  # not: begins again, silently
    tiny_train(half)


def test_a_checkpoint_that_another_config_wrote(half):
  text = (half / "config.json").read_text()
  (half / "config.json").write_text(text.replace('"mlp_dim": 32', '"mlp_dim": 48'))
  with pytest.raises(UserError, match=r"/4 was trained with another config: model.mlp_dim=32 there and 48"):
    tiny_train(half, model__mlp_dim=48)
  config = tiny_config(model__mlp_dim=48)
  model = build(config, make_tokenizer("bytes").vocab_size)
  other = abstract_state(model, make_optimizer(config, model.axes), partitioning.make_mesh(), False)
  message = (r"checkpoint .*/4 is of another architecture: decoder/00/ffn/w_gate is \(16, 32\) there and "
             r"\(16, 48\) here, .* and \d+ more differ; use the config it was trained with")
  with Checkpoints(str(half / "checkpoints")) as checkpoints, pytest.raises(UserError, match=message):
    checkpoints.restore(other, 4)


def test_a_checkpoint_of_a_newer_version(half, tmp_path, monkeypatch):
  monkeypatch.setattr(meta, "FORMAT", meta.FORMAT + 1)
  tiny_train(tmp_path / "newer", train__steps=1, **QUICK)
  monkeypatch.undo()
  for read in (load, tiny_train):
    keys = {} if read is load else dict(train__steps=1, **QUICK)
    with pytest.raises(UserError, match=r"has format 2, this version reads up to 1; install the version"):
      read(str(tmp_path / "newer"), **keys)


@pytest.mark.parametrize("path", ["checkpoints", "checkpoints/4", "checkpoints/4/meta/metadata", "state"])
def test_a_checkpoint_without_permission_to_read(half, path):
  """Root may read anything, so it becomes a user who may read only what others may."""
  with tempfile.TemporaryDirectory() as open_folder:
    run = pathlib.Path(open_folder) / "run"
    shutil.copytree(half, run)
    for place in (run.parent, run, *run.rglob("*")):
      place.chmod(0o755)
    # All that holds arrays: which of several files those of a part are in is not said.
    paths = [*(run / "checkpoints/4/state").rglob("d/*")] if path == "state" else [run / path]
    for path in paths:
      path.chmod(0)
    user = os.geteuid()
    try:
      if user == 0:
        os.seteuid(65534)
      with pytest.raises(UserError, match=r"cannot be read.*; mend its permissions"):
        load(str(run))
    finally:
      os.seteuid(user)
      for path in paths:
        path.chmod(0o700)


# A full disk


@contextlib.contextmanager
def small_disk(folder, megabytes):
  folder.mkdir()
  made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder],
                        capture_output=True)
  if made.returncode:
    pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
  try:
    yield folder
  finally:
    gc.collect()  # asyncio reports what a failed save did not await when it is collected: now, not at the end
    subprocess.run(["umount", "-l", folder], check=True)


# Where one array cannot be written, orbax forgets the tasks of the others.
on_a_full_disk = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def fill(path):
  with contextlib.suppress(OSError), path.open("wb", buffering=0) as f:
    while f.write(b"x" * 4096):
      pass


@pytest.mark.slow
@on_a_full_disk
def test_a_full_disk_costs_no_step(whole, tmp_path, capsys, monkeypatch):
  """Full from step 1 to step 3: the save of step 2 fails, training goes on, that of step 4 succeeds."""
  with small_disk(tmp_path / "disk", 8) as disk:
    workdir, filler = disk / "run", disk / "filler"
    actions = {8: lambda: fill(filler), 24: filler.unlink}
    on_record(monkeypatch, lambda i: actions.get(i, lambda: None)())
    run = tiny_train(workdir)
    told = capsys.readouterr().err
    assert re.search(r"step 2 could not be saved in .* \(.*No space left on device.*\); training goes", told)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4"]
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 4]
    assert_same_bits(run.params, whole[1].params)


@on_a_full_disk
@pytest.mark.slow
def test_a_disk_that_stays_full_is_a_mistake_to_mend(tmp_path, monkeypatch):
  with small_disk(tmp_path / "disk", 8) as disk:
    on_record(monkeypatch, lambda i: fill(disk / "filler") if i == 8 else None)
    message = "step 4 could not be saved.*make room and run the same command again: it resumes from step 0"
    with pytest.raises(UserError, match=message):
      tiny_train(disk / "run", **QUICK)


@on_a_full_disk
def test_a_failed_save_leaves_nothing_behind(tmp_path):
  """No thread that writes on, and no folder that the next save of the same step stumbles over."""
  before = set(threading.enumerate())
  with small_disk(tmp_path / "disk", 4) as disk:
    params = {str(i): jax.random.normal(jax.random.key(i), (300, 400)) for i in range(6)}
    state = TrainState(jnp.int32(2), params, {}, ())
    with Checkpoints(str(disk / "checkpoints"), 3) as checkpoints:
      for pages in (0, 1, 100, 600):  # room for nothing, for folders, for a part of the arrays
        fill(disk / "filler")
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - 4096 * pages)
        told = checkpoints.save(state, {}) or checkpoints.wait()
        assert re.search(r"step 2 could not be saved.*No space left", told)
        assert not list((disk / "checkpoints").iterdir())
      (disk / "filler").unlink()
      assert checkpoints.save(state, {}) is None and checkpoints.wait() is None
      assert checkpoints.steps() == [2]
  for thread in set(threading.enumerate()) - before:
    threading.Thread.join(thread, 5)
    assert not thread.is_alive(), thread


@on_a_full_disk
@pytest.mark.parametrize("begun", [
    pytest.param(False, id="start"), pytest.param(True, id="resume", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_the_start_is_one_line(whole, tmp_path, begun):
  with small_disk(tmp_path / "disk", 8) as disk:
    workdir = disk / "run"
    if begun:
      shutil.copytree(whole[0], workdir)
      shutil.rmtree(workdir / "checkpoints" / "4")
    fill(disk / "filler")
    before = sorted(path.name for path in disk.rglob("*"))
    with pytest.raises(UserError, match=r"cannot be (written|made) \(No space left on device\)") as e:
      tiny_train(workdir, **QUICK) if not begun else tiny_train(workdir)
    assert "\n" not in str(e.value) and set(before) <= {path.name for path in disk.rglob("*")}


def test_a_failed_process_ends_though_a_thread_does_not():
  code = ("import threading, time; from sparse_experts import processes; processes.PATIENCE = 0.2;"
          "threading.Thread(target=time.sleep, args=(60,)).start(); processes.leave(2)")
  begun = time.monotonic()
  root = pathlib.Path(__file__).parents[2]
  assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 2
  assert time.monotonic() - begun < 30  # seconds: a start of Python on a busy machine


def test_rows_wait_for_room(tmp_path):
  with small_disk(tmp_path / "disk", 1) as disk:
    log = JsonLines(str(disk / "metrics.jsonl"), 0)
    log.write({"step": 1})
    fill(disk / "filler")
    for step in (2, 3):
      with pytest.raises(OSError, match="No space left"):
        log.write({"step": step, "text": "x" * 5000})
    (disk / "filler").unlink()
    log.write({"step": 4})
    log.close()
    assert [row["step"] for row in rows(disk)] == [1, 2, 3, 4]


# Signals


def test_sigterm_saves_and_the_same_command_goes_on(whole, tmp_path, capsys, monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  # While the data of step 3 are read.
  on_record(monkeypatch, lambda i: os.kill(os.getpid(), signal.SIGTERM) if i == 16 else None)
  with pytest.raises(SystemExit) as stopped:  # a loop of a program must not go on with half a run
    tiny_train(tmp_path)
  assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
  assert "SIGTERM: saved at step 3; the same command resumes from there" in capsys.readouterr().err
  monkeypatch.undo()
  run = tiny_train(tmp_path)
  assert "at step 3" in capsys.readouterr().err
  assert_same_bits(run.params, whole[1].params)


@pytest.mark.slow
def test_sigterm_in_the_final_evaluation_leaves_only_that_to_do(tmp_path, capsys, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(Countdown, "__call__", lambda self, done: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
      tiny_train(tmp_path)
  err = capsys.readouterr().err
  assert "SIGTERM: stopped in the final evaluation, step 4 is saved; the same command evaluates" in err
  assert "validation loss" not in err and rows(tmp_path)[-1]["step"] == 4
  monkeypatch.setattr("sparse_experts.training.loop._steps", None)
  tiny_train(tmp_path)
  assert "validation loss" in capsys.readouterr().err and "eval/final/nats_per_byte" in rows(tmp_path)[-1]


def test_ctrl_c_saves_first(tmp_path, capsys, monkeypatch):
  on_record(monkeypatch, lambda i: os.kill(os.getpid(), signal.SIGINT) if i == 8 else None)
  with pytest.raises(KeyboardInterrupt):
    tiny_train(tmp_path)
  assert "SIGINT: saved at step 2" in capsys.readouterr().err
  assert (tmp_path / "checkpoints" / "2").is_dir()


@pytest.mark.slow
def test_sighup_of_a_terminal_that_closes_saves(tmp_path, capsys, monkeypatch, request):
  ours = signal.signal(signal.SIGHUP, before := signal.SIG_DFL)  # nohup, around the tests, ignores it
  request.addfinalizer(lambda: signal.signal(signal.SIGHUP, ours))
  on_record(monkeypatch, lambda i: os.kill(os.getpid(), signal.SIGHUP) if i == 8 else None)
  with pytest.raises(SystemExit) as stopped:
    tiny_train(tmp_path, **QUICK)
  assert stopped.value.code == 129 and signal.getsignal(signal.SIGHUP) is before
  assert "SIGHUP: saved at step 2; the same command resumes from there" in capsys.readouterr().err
  assert (tmp_path / "checkpoints" / "2").is_dir()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM"])
def test_a_signal_that_is_ignored_stays_ignored(name):
  """As SIGHUP by nohup, and Ctrl-C of a command that a script started in the background."""
  number = getattr(signal, name)
  before = signal.signal(number, signal.SIG_IGN)
  try:
    with interrupt.Interrupt() as asked:
      asked.begin()
      os.kill(os.getpid(), number)
      assert asked.asked(1) is None
    assert signal.getsignal(number) is signal.SIG_IGN
  finally:
    signal.signal(number, before)


def test_sighup_to_one_of_several_processes_is_handled_as_sigterm(monkeypatch):
  """With several, jax handles SIGTERM and makes all stop at one step."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  got, before = [], signal.signal(signal.SIGTERM, lambda *_: got.append("SIGTERM"))
  try:
    with interrupt.Interrupt():
      os.kill(os.getpid(), signal.SIGHUP)
      assert got == ["SIGTERM"]
  finally:
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_program_once_all_is_saved(name, code):
  """Wherever it came, after the last step too: the program's own handler is called, and then it ends."""
  number, got = getattr(signal, name), []
  before = signal.signal(number, lambda n, _: got.append(n))
  try:
    with pytest.raises(SystemExit) as stopped, interrupt.Interrupt():
      os.kill(os.getpid(), number)
      assert got == []
    assert got == [number] and stopped.value.code == code
    with pytest.raises(KeyError), interrupt.Interrupt():  # an error on the way says more
      os.kill(os.getpid(), number)
      raise KeyError
  finally:
    signal.signal(number, before)


def test_several_processes_end_together_after_sigterm(monkeypatch):
  """jax says so to each of them, whichever got the signal."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(interrupt.multihost_utils, "reached_preemption_sync_point", lambda step: step == 2)
  with pytest.raises(SystemExit) as stopped, interrupt.Interrupt() as asked:
    assert asked.asked(1) is None and asked.asked(2) == "SIGTERM"
  assert stopped.value.code == 143


def test_the_command_line_ends_with_0_after_sigterm(tmp_path, monkeypatch):
  def stopped(*_, **__):
    raise Stopped("SIGTERM")

  monkeypatch.setattr("sparse_experts.training.loop.train", stopped)
  assert cli.main(["train", "--config=configs/smoke.py", f"--workdir={tmp_path}/run"]) == 0


@pytest.mark.parametrize("where", ["before the steps", "after the steps"])
def test_ctrl_c_is_immediate_where_no_step_is_under_way(where):
  """While programs compile, and in the final evaluation: the state is on disk, or was never changed."""
  with interrupt.Interrupt() as asked:
    if where == "after the steps":
      asked.begin()
      asked.end()
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)


def test_ctrl_c_in_the_last_step_is_not_lost():
  with interrupt.Interrupt() as asked:
    asked.begin()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      asked.end()


def test_ctrl_c_while_the_step_compiles_ends_the_run(tmp_path, monkeypatch):
  def compiling(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)

  monkeypatch.setattr("sparse_experts.training.loop.jit_train_step", compiling)
  with pytest.raises(KeyboardInterrupt):
    tiny_train(tmp_path, **QUICK)
  assert not (tmp_path / "lease.json").exists()


def test_a_second_ctrl_c_does_not_wait():
  with interrupt.Interrupt() as asked:
    assert asked.asked(1) is None
    asked.begin()
    os.kill(os.getpid(), signal.SIGINT)
    assert asked.asked(2) == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)


def test_a_run_may_live_in_a_thread(whole, tmp_path):
  """Where Python allows no signal handlers."""
  failures = []

  def work():
    try:
      tiny_train(tmp_path, train__steps=1, **QUICK)
    except BaseException as e:
      failures.append(e)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert not failures


# Its own output


class Full(io.StringIO):
  def write(self, text):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_output_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "stderr", Full())
  monkeypatch.setattr(sys, "stdout", Full())
  run = tiny_train(tmp_path, train__steps=2, **QUICK)
  assert run.step == 2 and rows(tmp_path)[-1]["step"] == 2


@pytest.mark.slow
def test_a_workdir_with_an_escape_in_its_name(tmp_path, capsys):
  workdir = tmp_path / "a\033[31mred"
  for _ in range(2):
    tiny_train(workdir, train__steps=1, **QUICK)
  told = capsys.readouterr().err
  assert "a\\u001b[31mred is already finished" in told and "\033" not in told


# Numbers that are not finite


def _spoil(monkeypatch, *records):
  """The loss of a batch with such a record is infinite."""
  get = Dataset.__getitem__
  monkeypatch.setattr(Dataset, "__getitem__", lambda self, i: get(self, i) | (
      {"weights": np.full(32, np.inf, np.float32)} if i in records and len(self) > 10**6 else {}))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(whole, tmp_path, monkeypatch):
  _spoil(monkeypatch, 2 * 8)
  message = (r"step 3: the loss or its gradient is not finite, in the backward pass only; the last good "
             r"checkpoint is step 2. Set train.skip_nonfinite=true")
  with pytest.raises(NonFinite, match=message):
    tiny_train(tmp_path, train__log_every=4)
  assert_same_bits(load(str(tmp_path)).params, load(str(whole[0]), step=2).params)
  run = tiny_train(tmp_path, train__log_every=4, train__skip_nonfinite=True)  # as the message says
  last = rows(tmp_path)[-2]
  assert last["step"] == 4 and last["skipped"] == 1 and np.isfinite(last["loss"])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(run.params)))


@pytest.mark.slow
def test_a_run_of_nothing_but_nan_says_so(tmp_path, capsys, monkeypatch):
  _spoil(monkeypatch, *range(0, 64, 8))
  tiny_train(tmp_path, train__skip_nonfinite=True, **QUICK)
  assert "step 4/4  loss nan (1 updates skipped)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "seq2seq"])
def test_the_layer_is_named(name):
  config = tiny_config(model__name=name, data__objective="causal", model__num_layers=4)
  model = build(config, 40)
  params, buffers = model.init(jax.random.key(0))
  shape, ones = (8, 32), np.ones((8, 32), np.int32)
  batch = {"decoder_inputs": ones, "encoder_inputs": ones, "targets": ones, "encoder_segments": ones,
           "segments": ones, "positions": np.broadcast_to(np.arange(32), shape)}
  find = lambda params: nonfinite.find(model, params, buffers, batch, jax.random.key(1))

  def spoilt(stack, layer, path):
    s, repeat, i = model.stacks[stack].where(layer)
    copy = jax.tree.map(lambda x: x, params)
    inner = copy[stack]["blocks"][str(s)][str(i)]
    for part in path[:-1]:
      inner = inner[part]
    inner[path[-1]] = inner[path[-1]].at[repeat].set(jnp.nan)
    return copy

  stack, layer = ("decoder", 3) if name == "decoder" else ("encoder", 2)
  bad = spoilt(stack, layer, ("attention", "query"))
  assert find(bad) == f"first in the output of layer {stack}/{layer:02d}"
  sparse = ("ffn", "router", "w")
  assert find(spoilt("decoder", 3, sparse)) == "first in what router TopKRouter of layer decoder/03 says"
  if name == "seq2seq":
    return
  assert find(params) == "in the backward pass only"
  params["embedding"]["table"] = params["embedding"]["table"].at[3].set(jnp.inf)  # an id that is not read
  assert find(params) == "first in the logits"


# Input


@pytest.mark.slow
def test_an_input_that_does_not_answer(tmp_path, monkeypatch, capsys):
  get = Dataset.__getitem__
  monkeypatch.setattr(Dataset, "__getitem__", lambda self, i: time.sleep(60) if i == 30 else get(self, i))
  with pytest.raises(UserError, match=r"process 0 of 1 waited 2 seconds for the data of step 4; see what"):
    tiny_train(tmp_path, train__input_timeout=2.0)
  assert "saved at step 3" in capsys.readouterr().err
  assert load(str(tmp_path)).step == 3


def test_a_source_that_does_not_answer(tmp_path, capsys, monkeypatch):
  (tmp_path / "stuck.py").write_text("import time\ndef read(config):\n  time.sleep(60)\n")
  monkeypatch.syspath_prepend(tmp_path)
  code = cli.main(["train", "--config=configs/smoke.py", f"--workdir={tmp_path}/run",
                   "--config.data.source=stuck:read", "--config.train.input_timeout=0.5"])
  assert code == 2
  assert re.fullmatch(r"error: process 0 of 1 waited 0.5 seconds for data.source='stuck:read'; see .*\n",
                      capsys.readouterr().err)


# All of it


_SCRIPT = """
import sys
from tests.training.tiny import tiny_train
tiny_train(sys.argv[1], train__steps=60, train__checkpoint_every=1, train__eval_every=10)
"""


class Trainings:
  """Processes that train a run of 60 steps, one after another; what they say goes to a file."""

  def __init__(self, workdir, log, compiled_programs):
    self.workdir, self.log, self.root = workdir, log, pathlib.Path(__file__).parents[2]
    self.env = os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled_programs, "PYTHONPATH": str(self.root)}
    self.process = None

  def start(self):
    with open(self.log, "w") as stderr:
      command = [sys.executable, "-c", _SCRIPT, str(self.workdir)]
      self.process = subprocess.Popen(command, cwd=self.root, env=self.env, stderr=stderr)

  def said(self):
    return self.log.read_text()

  def newest(self):
    return max((int(p.name) for p in self.workdir.glob("checkpoints/*") if p.name.isdecimal()), default=0)

  def saving(self):
    return any(".orbax-checkpoint-tmp" in name for name in os.listdir(self.workdir / "checkpoints"))

  def until(self, reached, action=lambda: None):
    """Repeats `action` until reached(), while the process trains."""
    while not reached():
      assert self.process.poll() is None, self.said()[-2000:]
      action()
      time.sleep(0.0005)

  def end(self):
    return self.process.wait(300)

  def kill(self):
    assert self.process.poll() is None, self.said()[-2000:]
    self.process.kill()
    self.process.wait()


def fill_until_a_save_fails(trainings, filler):
  """Again and again: a save that succeeds makes room, for it removes an older step."""
  def more():
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as f:
      while f.write(b"x" * 4096):
        pass

  trainings.until(lambda: "could not be saved" in trainings.said(), more)


@pytest.mark.slow
def test_twenty_kills_two_full_disks_and_a_damaged_step_change_nothing(compiled_programs, tmp_path):
  """At any moment, every second kill while a save is under way; nobody mends anything but the full disks."""
  whole = Trainings(tmp_path / "whole", tmp_path / "whole.log", compiled_programs)
  whole.start()
  assert whole.end() == 0, whole.said()[-2000:]
  rng = np.random.default_rng(0)
  with small_disk(tmp_path / "disk", 16) as disk:
    run = Trainings(disk / "run", tmp_path / "run.log", compiled_programs)
    for kills in range(20):
      done = run.newest()
      if kills == 9:
        DAMAGE["a flipped byte of the arrays"](run.workdir / f"checkpoints/{done}")
      run.start()
      target = min(done + 2 + int(rng.integers(2)), 55)
      if kills in (6, 13):
        run.until(lambda: run.newest() > done)  # noqa: B023
        fill_until_a_save_fails(run, disk / "filler")
        if kills == 6:  # trains to the end, where the last step cannot be saved either
          assert run.end() != 0 and run.newest() < 60 and "make room" in run.said()
          (disk / "filler").unlink()
          run.start()
        else:  # there is room again while it trains
          (disk / "filler").unlink()
        target = run.newest() + 2
      run.until(lambda: run.newest() >= target - 1)  # noqa: B023
      run.until(run.saving if kills % 2 else lambda: run.newest() >= target)  # noqa: B023
      time.sleep(0 if kills % 2 else float(rng.uniform(0, 0.1)))
      run.kill()
      if kills == 9:
        assert f"kept aside as damaged-{done}" in run.said()
    run.start()
    assert run.end() == 0, run.said()[-2000:]
    a, b = load(str(whole.workdir)), load(str(run.workdir))
    assert a.step == b.step == 60
    assert_same_bits(a.params, b.params)
    but = re.compile(r"(tokens|seconds)_per_.*|.*/dead|run")
    plain = lambda folder: [{k: v for k, v in row.items() if not but.fullmatch(k)} for row in rows(folder)]
    assert plain(whole.workdir) == plain(run.workdir)
    assert "eval/final/nats_per_byte" in rows(run.workdir)[-1]
