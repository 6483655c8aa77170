"""A run at a gs:// address: the same bits and rows as in a folder, whatever the store does."""

import json
import re

import jax
import numpy as np
import pytest

from sparse_experts import storage
from sparse_experts.errors import UserError
from sparse_experts.storage import objects
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.run import load
from sparse_experts.training.state import TrainState
from tests.training.tiny import tiny_train


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
