"""A run at a gs:// address: the same bits and rows as in a folder, whatever the store does."""

import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from sparse_experts import storage
from sparse_experts.errors import UserError
from sparse_experts.storage import objects
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.run import load
from sparse_experts.training.state import TrainState
from tests.store import names
from tests.training.test_durability import on_record
from tests.training.tiny import tiny_train

ROOT = pathlib.Path(__file__).parents[2]


def rows(workdir):
  parts = map(storage.read, storage.log_parts(f"{workdir}/metrics.jsonl"))
  return [json.loads(line) for line in b"".join(parts).splitlines()]


def plain(workdir):
  """Rows without what a clock says."""
  but = re.compile(r"(tokens|seconds)_per_.*|.*/dead|run")
  return [{k: v for k, v in row.items() if not but.fullmatch(k)} for row in rows(workdir)]


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def run(store):
  """(address, run) of four uninterrupted steps."""
  return (workdir := "gs://bucket/a run/1"), tiny_train(workdir)


@pytest.fixture
def copy(run, bucket):
  """Another run with the same objects."""
  for name in objects.tree(run[0]):
    storage.write(f"{bucket}/{name}", storage.read(f"{run[0]}/{name}"))
  return bucket


def test_the_same_bits_and_rows_as_in_a_folder(whole, run):
  workdir, trained = run
  assert_same_bits(trained.params, whole[1].params)
  assert plain(workdir) == plain(whole[0])
  assert set(storage.names(workdir)) == {path.name for path in whole[0].iterdir()}
  assert storage.names(f"{workdir}/checkpoints") == ["2", "4"]
  for step in (2, 4):
    assert_same_bits(load(f"{workdir}/", step).params, load(str(whole[0]), step).params)


def test_a_folder_copied_from_a_store_and_back_is_a_run(run, whole, tmp_path, bucket):
  with storage.fetched(run[0]) as folder:
    assert_same_bits(load(folder).params, whole[1].params)
    objects.put_folder(folder, bucket)
  assert_same_bits(load(bucket, 2).params, load(str(whole[0]), 2).params)


@pytest.mark.slow
def test_a_run_of_a_folder_is_copied_to_a_store_and_goes_on(whole, bucket, capsys):
  """Its steps have no markers; a part of one is none."""
  objects.put_folder(str(whole[0]), bucket)
  storage.write(f"{bucket}/checkpoints/3/_CHECKPOINT_METADATA", '{"commit_timestamp_nsecs": null}')
  assert load(bucket, 2).step == 2 and load(bucket).step == 4
  tiny_train(bucket, train__steps=5)
  assert f"resuming {bucket} at step 4" in capsys.readouterr().err
  assert storage.names(f"{bucket}/checkpoints") == ["2", "4", "5"]


@pytest.mark.slow
def test_it_goes_on_where_it_was(whole, copy, capsys, tmp_path):
  storage.remove_folder(f"{copy}/checkpoints/4")
  storage.write(f"{copy}/checkpoints/4/state/d/x", "a save that was cut short")
  assert load(copy).step == 2
  run = tiny_train(copy)
  assert f"resuming {copy} at step 2" in capsys.readouterr().err
  assert_same_bits(run.params, whole[1].params)
  assert plain(copy) == plain(whole[0]) and not storage.exists(f"{copy}/lease.json")
  assert "x" not in storage.names(f"{copy}/checkpoints/4/state/d")
  tiny_train(copy)
  assert "is already finished: step 4 of 4" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_step_is_named_and_kept_aside(whole, copy, capsys):
  found = {name: info["size"] for name, info in objects.tree(f"{copy}/checkpoints/4/state").items()}
  largest = f"{copy}/checkpoints/4/state/{max(found, key=found.__getitem__)}"
  content = bytearray(storage.read(largest))
  content[len(content) // 2] ^= 0x10
  storage.write(largest, bytes(content))
  run = tiny_train(copy)
  told = capsys.readouterr().err
  assert "kept aside as damaged-4\n" in told and f"resuming {copy} at step 2" in told
  assert_same_bits(run.params, whole[1].params)
  assert storage.names(f"{copy}/checkpoints") == ["2", "4", "damaged-4"]


@pytest.mark.slow
def test_a_damaged_row_is_kept_aside(copy, capsys):
  text = storage.read(f"{copy}/metrics.jsonl")
  storage.write(f"{copy}/metrics.jsonl", text.replace(b'{"step": 2', b'{"step 2'))
  tiny_train(copy, train__steps=5)
  assert "has 1 damaged line; kept aside as damaged-metrics.jsonl" in capsys.readouterr().err
  assert [row["step"] for row in rows(copy)] == [1, 3, 4, 4, 5, 5]


def state(step):
  return TrainState(np.int32(step), {"w": jax.numpy.ones((30, 4)) * step}, {}, ())


def test_older_steps_go_and_the_best_stays(bucket):
  with Checkpoints(f"{bucket}/checkpoints", 2) as checkpoints:
    for step, loss in ((2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)):
      assert checkpoints.save(state(step), {}, loss) is None
      assert checkpoints.wait() is None
    assert checkpoints.steps() == [2, 4, 5]
  assert storage.names(f"{bucket}/checkpoints") == ["2", "4", "5"]
  with Checkpoints(f"{bucket}/checkpoints", 2) as checkpoints:
    assert checkpoints.steps() == [2, 4, 5]


def test_a_second_training_is_refused(bucket):
  with storage.lease(bucket, "w", print), pytest.raises(UserError, match=f"workdir {bucket} is in use by"):
    tiny_train(bucket)


@pytest.mark.parametrize("workdir, message", [
    ("gs://nobucket/run", "workdir gs://nobucket/run: there is no bucket 'nobucket'; make it, or mend"),
    ("gs://closed/run", r"workdir gs://closed/run cannot be written \(no rights there"),
    ("gs://bucket/a[1]", r"'gs://bucket/a\[1\]/checkpoints' has characters that orbax cannot read; name the"),
])
def test_where_no_run_can_be_kept(store, workdir, message):
  with pytest.raises(UserError, match=message):
    tiny_train(workdir)


@pytest.mark.parametrize("workdir, message", [
    ("gs://nobucket/run", "workdir gs://nobucket/run does not exist; name the folder of a trained run"),
    ("gs://bucket/none", "workdir gs://bucket/none does not exist; name the folder of a trained run"),
    ("gs://closed/run", r"workdir gs://closed/run cannot be read \(no rights there.*\); mend its"),
])
def test_where_no_run_is(store, workdir, message):
  with pytest.raises(UserError, match=message):
    load(workdir)


# A store that is out of order


HARM = [{"fault": fault, "share": 0.012}
        for fault in ("503", "429", "no answer", "half an answer", "half an upload")]


@pytest.mark.slow
def test_faults_at_random_cost_no_step(whole, bucket, store):
  with store.harmed(*HARM, {"fault": "slow", "share": 0.02}):
    run = tiny_train(bucket)
  assert sum(store.harms().values()) > 5
  assert_same_bits(run.params, whole[1].params)
  assert_same_bits(load(bucket).params, whole[1].params)
  assert plain(bucket) == plain(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "hang"])
def test_a_store_that_is_away_while_it_trains(whole, bucket, store, monkeypatch, capsys, fault):
  """From step 2 to step 4 nothing answers: the save of step 2 goes on when it does."""
  back = []

  def action(i):
    if i == 8:
      store.harm({"fault": fault})
      timer = threading.Timer(10, store.harm)
      timer.start()
      back.append(timer)

  on_record(monkeypatch, action)
  run = tiny_train(bucket)
  assert_same_bits(run.params, whole[1].params)
  assert storage.names(f"{bucket}/checkpoints") == ["2", "4"] and plain(bucket) == plain(whole[0])


@pytest.mark.slow
def test_credentials_that_end_are_told_and_the_next_save_is_tried(whole, bucket, store, monkeypatch, capsys):
  """From step 1 to step 3: the save of step 2 fails, training goes on, that of step 4 succeeds."""
  actions = {8: lambda: store.harm({"fault": "403"}), 24: store.harm}
  on_record(monkeypatch, lambda i: actions.get(i, lambda: None)())
  run = tiny_train(bucket)
  told = capsys.readouterr().err
  assert re.search(r"step 2 could not be saved in .*; training goes on, the next save will be tried\n", told)
  assert told.count("could not be written") <= 2  # rows and TensorBoard
  assert told.count("could not be saved") == 1
  assert storage.names(f"{bucket}/checkpoints") == ["4"]
  assert_same_bits(load(bucket).params, whole[1].params)
  assert_same_bits(run.params, whole[1].params)
  assert plain(bucket) == plain(whole[0])


@pytest.mark.slow
def test_credentials_that_do_not_come_back(bucket, store, monkeypatch, capsys):
  def action(i):
    if i == 24:
      while not storage.is_complete(f"{bucket}/checkpoints/2"):
        time.sleep(0.05)
      store.harm({"fault": "403"})

  on_record(monkeypatch, action)
  message = "step 4 could not be saved in .*; mend that and run the same command again: it resumes from the"
  with pytest.raises(UserError, match=message):
    tiny_train(bucket)
  store.harm()
  assert storage.names(f"{bucket}/checkpoints") == ["2"]


_SCRIPT = """
import sys
from tests.training.tiny import tiny_train
tiny_train(sys.argv[1], train__steps=16, train__checkpoint_every=2, train__eval_every=8, train__log_every=2)
"""


@pytest.mark.slow
def test_five_kills_and_a_store_that_fails_change_nothing(compiled_programs, bucket, store, tmp_path):
  """At any moment, of a run in a store that fails one request of sixteen."""
  env = os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled_programs}

  def start(workdir):
    with open(tmp_path / "log", "w") as log:
      return subprocess.Popen([sys.executable, "-c", _SCRIPT, workdir], cwd=ROOT, env=env, stderr=log)

  said = lambda: (tmp_path / "log").read_text()
  assert start(str(tmp_path / "whole")).wait(300) == 0, said()
  newest = lambda: max([0, *map(int, filter(str.isdecimal, names(f"{bucket}/checkpoints")))])
  rng = np.random.default_rng(0)
  store.harm(*HARM)
  for kill in range(5):
    process, target = start(bucket), newest() + 2 * (kill % 2)
    while newest() < min(target, 14) or "step" not in said():
      assert process.poll() is None, said()[-3000:]
      time.sleep(0.05)
    time.sleep(float(rng.uniform(0, 1.5)))
    process.kill()
    process.wait()
  assert start(bucket).wait(300) == 0, said()[-3000:]
  store.harm()
  assert sum(store.harms().values()) > 10
  a, b = load(str(tmp_path / "whole")), load(bucket)
  assert a.step == b.step == 16
  assert_same_bits(a.params, b.params)
  assert plain(bucket) == plain(str(tmp_path / "whole"))
  assert "eval/final/nats_per_byte" in rows(bucket)[-1]
