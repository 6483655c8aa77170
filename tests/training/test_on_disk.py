"""Written means on the disk: what a power cut leaves of a run goes on. One training per folder."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import storage
from sparse_experts.data import Dataset
from sparse_experts.errors import UserError
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.checkpoints.arrays import open_arrays
from sparse_experts.training.checkpoints.mapped import save_mapped
from sparse_experts.training.run import load
from sparse_experts.training.state import TrainState
from tests.training.test_durability import on_record
from tests.training.tiny import tiny_train

leases = sys.modules["sparse_experts.storage.lease"]  # `storage.lease` is its function
QUICK = dict(eval__train_windows=8, eval__min_bytes=200)


@pytest.fixture
def calls(monkeypatch):
  """(word, path) of every flush, move and removed folder, in order, of all threads."""
  found, lock = [], threading.Lock()

  def record(module, name, word, path_of):
    real = getattr(module, name)

    def call(*args, **keys):
      path = path_of(*args)
      result = real(*args, **keys)
      with lock:
        found.append((word, os.fspath(path)))
      return result

    monkeypatch.setattr(module, name, call)

  record(os, "fsync", "flush", lambda place: os.readlink(f"/proc/self/fd/{place}"))
  record(os, "replace", "move", lambda path, target: target)
  record(shutil, "rmtree", "remove", lambda path, *_: path)
  return found


def assert_flushed_before(calls, folder, moved):
  """All files and folders of what is `folder` by now were flushed before its last move, its parent after."""
  at = max(i for i, call in enumerate(calls) if call == ("move", str(moved)))
  before = {path for word, path in calls[:at] if word == "flush"}
  below = [p.relative_to(folder) for p in folder.rglob("*")]
  assert len(below) > 5
  for part in below:
    assert any(path.endswith(f".orbax-checkpoint-tmp/{part}") for path in before), (part, before)
  assert ("flush", str(folder.parent)) in calls[at:]
  return at


def test_a_checkpoint_is_on_the_disk_before_it_counts_and_before_an_older_one_goes(tmp_path, calls):
  folder = tmp_path / "checkpoints"
  state = lambda step: TrainState(jnp.int32(step), {"w": jnp.ones((30, 4))}, {}, ())
  with Checkpoints(str(folder), 1) as checkpoints:
    assert checkpoints.save(state(1), {"config": "{}"}) is None and checkpoints.wait() is None
    assert checkpoints.save(state(2), {"config": "{}"}) is None and checkpoints.wait() is None
    assert checkpoints.steps() == [2]
  at = assert_flushed_before(calls, folder / "2", folder / "2")
  gone = [i for i, (word, path) in enumerate(calls) if word == "remove" and path == str(folder / "1")]
  assert gone and gone[0] > calls.index(("flush", str(folder)), at)


def test_a_converted_checkpoint_is_on_the_disk_too(tmp_path, calls):
  x = np.ones((30, 4), np.float32)
  save_mapped(str(tmp_path / "c"), TrainState(np.zeros((), np.int32), {"w": x}, {}, ()), {}, {})
  assert_flushed_before(calls, tmp_path / "c" / "0", tmp_path / "c" / "0")


def test_a_disk_that_takes_no_flush_keeps_the_older_checkpoint(tmp_path, monkeypatch):
  state = lambda step: TrainState(jnp.int32(step), {"w": jnp.ones((30, 4))}, {}, ())
  with Checkpoints(str(tmp_path), 1) as checkpoints:
    assert checkpoints.save(state(1), {}) is None and checkpoints.wait() is None

    def lost(folder):
      raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "flush_tree", lost)
    told = checkpoints.save(state(2), {}) or checkpoints.wait()
    assert re.search(r"step 2 could not be saved .*Input/output error", told)
    monkeypatch.undo()
    assert checkpoints.steps() == [1] and [p.name for p in tmp_path.iterdir()] == ["1"]
    assert checkpoints.save(state(2), {}) is None and checkpoints.wait() is None
    assert checkpoints.steps() == [2]


def test_rows_and_config_are_on_the_disk_before_a_checkpoint(tmp_path, calls):
  tiny_train(tmp_path, **QUICK)
  first = calls.index(("move", str(tmp_path / "checkpoints" / "2")))
  for name in ("config.json", "tokenizer.model"):
    moved = calls.index(("move", str(tmp_path / name)))
    assert calls[moved - 1] == ("flush", str(tmp_path / f"{name}.tmp"))
    assert calls[moved + 1] == ("flush", str(tmp_path)) and moved < first
  rows = [i for i, call in enumerate(calls) if call == ("flush", str(tmp_path / "metrics.jsonl"))]
  last = calls.index(("move", str(tmp_path / "checkpoints" / "4")))
  assert rows[0] < first and rows[1] < last and any(i > last for i in rows)  # and the final row


def test_a_pipe_in_the_place_of_an_array_is_damage_and_is_not_waited_for(tmp_path):
  with Checkpoints(str(tmp_path), 2) as checkpoints:
    wanted = TrainState(jnp.int32(1), {"w": jnp.ones((30, 4))}, {}, ())
    assert checkpoints.save(wanted, {}) is None and checkpoints.wait() is None
  for path in (tmp_path / "1" / "state" / "d").iterdir():
    path.unlink()
    os.mkfifo(path)
  with pytest.raises(ValueError, match="is not a file"):
    dict(open_arrays(str(tmp_path / "1"), {"params/w": jnp.ones((30, 4))}))


@contextlib.contextmanager
def mounted(image, folder):
  """A file system in a file."""
  folder.mkdir(exist_ok=True)
  made = subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True)
  if made.returncode:
    pytest.skip(f"cannot mount a file here: {made.stderr.decode().strip()}")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def at_one_moment(image, copy):
  """Copies an image that is written to: two readings that are equal are the disk between them."""
  before, now = None, image.read_bytes()
  while now != before:
    before, now = now, image.read_bytes()
  copy.write_bytes(now)
  return copy


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("mkfs.ext4"), reason="needs ext4")
def test_what_a_power_cut_leaves_goes_on(whole, tmp_path, monkeypatch, capsys):
  """The image of a mounted disk, copied while step 3 is made, holds what was on the disk then and no more."""
  image, cuts = tmp_path / "image", {}
  with image.open("wb") as f:
    f.truncate(96 * 2**20)
  subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
  with mounted(image, tmp_path / "disk") as disk:
    wait = Checkpoints.wait

    def cut(i):
      if i == 28:  # in step 4
        until = time.monotonic() + 60
        while not (disk / "run" / "checkpoints" / "2").exists():
          assert time.monotonic() < until, "step 2 is not saved"
          time.sleep(0.01)
      if i in (4, 16, 20, 28) and i not in cuts:  # in step 1, in step 3 while step 2 is saved
        cuts[i] = at_one_moment(image, tmp_path / f"cut{i}")

    def waited(self):
      result = wait(self)
      cuts["end"] = at_one_moment(image, tmp_path / "cutend")
      return result

    on_record(monkeypatch, cut)
    monkeypatch.setattr(Checkpoints, "wait", waited)
    tiny_train(disk / "run")
    monkeypatch.undo()
  assert len(cuts) == 5
  for name, cut in cuts.items():
    subprocess.run(["e2fsck", "-fy", str(cut)], capture_output=True)  # what a start does
    with mounted(cut, tmp_path / "after") as disk:
      monkeypatch.setattr(leases, "STALE", 0.0)  # this process holds the folder, in the copy
      steps = sorted(int(p.name) for p in (disk / "run" / "checkpoints").glob("?"))
      files = [disk / "run" / "config.json", disk / "run" / "tokenizer.model"]
      if steps:
        last = (disk / "run" / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["step"] >= steps[-1]
        files += [p for step in steps for p in (disk / "run" / "checkpoints" / str(step)).rglob("*")]
      assert steps or name in (4, 16, 20)
      assert all(p.stat().st_size for p in files if p.name != "commit_success.txt"), name
      capsys.readouterr()
      run = tiny_train(disk / "run")
      assert "damaged" not in capsys.readouterr().err
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.params), jax.device_get(whole[1].params))
      rows = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
      assert rows == [1, 2, 3, 4, 4], name


# One trainer


def test_a_second_training_is_refused_and_spoils_nothing(whole, tmp_path, monkeypatch):
  """It is started while the first makes step 3; the first ends as if alone."""
  get, refused = Dataset.__getitem__, []

  def read(self, i):
    if len(self) > 10**6 and i == 20 and not refused:
      refused.append("")
      try:
        tiny_train(tmp_path)
      except UserError as e:
        refused[0] = str(e)
    return get(self, i)

  monkeypatch.setattr(Dataset, "__getitem__", read)
  run = tiny_train(tmp_path)
  assert re.match(rf"workdir {tmp_path} is in use by process {os.getpid()} on host \S+; wait", refused[0])
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.params), jax.device_get(whole[1].params))
  assert not (tmp_path / storage.LEASE).exists()
  assert load(str(tmp_path)).step == 4


def test_a_training_whose_folder_was_taken_saves_no_more(tmp_path, monkeypatch):
  get = Dataset.__getitem__

  def read(self, i):
    if len(self) > 10**6 and i == 24:
      (tmp_path / storage.LEASE).write_text(json.dumps(dict(
          host="far", machine="boot", process=77, started="1", token="t")))
    return get(self, i)

  monkeypatch.setattr(Dataset, "__getitem__", read)
  with pytest.raises(UserError, match="is now that of process 77 on host far; this process saves no more"):
    tiny_train(tmp_path, **QUICK)
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} <= {"2"}
