"""The same batches arrive on every mesh and on any number of hosts, and from any step."""

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.data.feed import Feed, eval_batches, load, local_rows
from sparse_experts.errors import UserError

BATCH = 8


class Numbers:
  """Record i holds the number i; counts what is read."""

  def __init__(self, length=10**9):
    self.length, self.read = length, []

  def __len__(self):
    return self.length

  def __getitem__(self, i):
    self.read.append(i)
    return dict(targets=np.full(3, i + 1, np.int32), domain=np.int32(i + 1), weights=np.ones(3, np.float32))


def sharding(data=1, expert=1, model=1):
  return partitioning.batch_sharding(partitioning.make_mesh(data, expert, model))


def take(n, **args):
  with contextlib.closing(Feed(batch_size=BATCH, **args)) as feed:
    return [next(feed) for _ in range(n)]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1), (2, 4, 1), (8, 1, 1), (2, 2, 2)])
def test_row_r_of_step_s_is_record_s_times_b_plus_r(mesh):
  for s, batch in enumerate(take(3, dataset=Numbers(), sharding=sharding(*mesh))):
    wanted = 1 + s * BATCH + np.arange(BATCH)
    np.testing.assert_array_equal(batch["domain"], wanted)
    np.testing.assert_array_equal(batch["targets"], np.repeat(wanted[:, None], 3, axis=1))
    assert batch["targets"].sharding.is_equivalent_to(sharding(*mesh), 2)
    assert batch["weights"].dtype == np.float32


def test_resumes_from_any_step():
  straight = take(5, dataset=Numbers(), sharding=sharding(2, 4))
  resumed = take(2, dataset=Numbers(), sharding=sharding(1, 8), start_step=3)
  for a, b in zip(straight[3:], resumed):
    np.testing.assert_array_equal(a["targets"], b["targets"])


def test_each_row_is_read_once_even_where_devices_share_it():
  numbers = Numbers()
  take(1, dataset=numbers, sharding=sharding(2, 2, 2))
  first = numbers.read[:BATCH]
  assert first == list(range(BATCH))


class HalfOfTheDevices:
  """What a sharding says on one of two hosts."""

  def __init__(self, whole, host):
    self.whole, self.host = whole, host

  def addressable_devices_indices_map(self, shape):
    devices = sorted(self.whole.addressable_devices_indices_map(shape).items(), key=lambda d: d[0].id)
    n = len(devices) // 2
    return dict(devices[self.host * n:(self.host + 1) * n])


def test_hosts_share_the_rows():
  halves = [local_rows(HalfOfTheDevices(sharding(2, 4), host), 16) for host in (0, 1)]
  assert halves == [list(range(8)), list(range(8, 16))]
  # With the model axis split over hosts both need all rows.
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4).T, ("data", "model"))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  assert [local_rows(HalfOfTheDevices(rows, host), 16) for host in (0, 1)] == [list(range(16))] * 2


TWO_HOSTS = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from sparse_experts import partitioning
from sparse_experts.data.feed import Feed
from tests.data.test_feed import BATCH, Numbers
numbers = Numbers()
feed = Feed(numbers, BATCH, partitioning.batch_sharding(partitioning.make_mesh(2, 4)), start_step=5)
batch = next(feed)
feed.close()
shards = batch["targets"].addressable_shards
print(json.dumps(dict(
    rows=[[s.index[0].start, int(s.data[0, 0])] for s in shards], read=sorted(numbers.read)[:BATCH // 2],
    shape=batch["targets"].shape)))
"""


def test_two_real_processes_feed_one_global_batch():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  hosts = [subprocess.Popen([sys.executable, "-c", TWO_HOSTS, address, str(i)], stdout=subprocess.PIPE,
                            text=True, cwd=pathlib.Path(__file__).parents[2]) for i in range(2)]
  said = [json.loads(h.communicate(timeout=120)[0].strip().splitlines()[-1]) for h in hosts]
  rows = sorted(r for s in said for r in s["rows"])
  assert rows == [[r, 5 * BATCH + r + 1] for r in range(BATCH)]  # row r is record 5 * B + r, on any host
  assert [len(s["rows"]) for s in said] == [4, 4] and all(s["shape"] == [BATCH, 3] for s in said)
  assert not set(said[0]["read"]) & set(said[1]["read"])  # each host reads its own rows only


def test_close_joins_and_ends_the_iteration():
  before = threading.active_count()
  feed = Feed(Numbers(), BATCH, sharding(1, 8))
  next(feed)
  feed.close()
  assert threading.active_count() == before
  with pytest.raises(StopIteration):
    next(feed)
  feed.close()  # twice is no mistake


def test_prefetch_is_bounded():
  numbers = Numbers()
  feed = Feed(numbers, BATCH, sharding(1, 8), prefetch=2)
  next(feed)
  time.sleep(.3)
  feed.close()
  assert len(numbers.read) <= (1 + 2 + 1) * BATCH  # taken, waiting, and one in the thread's hand


def test_failure_in_the_thread_reaches_the_consumer():
  class Broken(Numbers):
    def __getitem__(self, i):
      if i >= BATCH:
        raise OSError(f"record {i} is gone")
      return super().__getitem__(i)

  feed = Feed(Broken(), BATCH, sharding(1, 8))
  assert next(feed)["domain"][0] == 1
  for _ in range(2):  # and again, if someone asks again
    with pytest.raises(OSError, match="record 8 is gone"):
      next(feed)
  feed.close()


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_evaluation_pads_the_last_batch_with_zero_rows(mesh):
  batches = list(eval_batches(Numbers(19), BATCH, sharding(*mesh)))
  rows = np.concatenate([b["domain"] for b in batches])
  assert rows.tolist() == [*range(1, 20), *[0] * 5]
  assert not np.any(batches[-1]["weights"][3:]) and np.all(batches[-1]["weights"][:3])


def test_evaluation_of_the_first_records():
  numbers = Numbers(19)
  rows = np.concatenate([b["domain"] for b in eval_batches(numbers, BATCH, sharding(), 10)])
  assert rows.tolist() == [*range(1, 11), *[0] * 6]
  assert max(numbers.read) == 9
  assert len(list(eval_batches(numbers, BATCH, sharding(), 10**6))) == 3


def test_rows_that_do_not_divide():
  for open_it in (Feed, lambda *a: next(eval_batches(*a))):
    with pytest.raises(UserError, match=r"12 rows does not divide over .* data x expert = 8; choose 16"):
      open_it(Numbers(), 12, sharding(2, 4))


def test_records_that_differ_are_named():

  class Uneven(Numbers):

    def __getitem__(self, i):
      return {"x": np.zeros(3 if i == 5 else 2, np.int32)}

  with pytest.raises(UserError, match=r"record 5 has x int32 \(3,\), record 4 has it int32 \(2,\); give"):
    load(Uneven(), 4, 4, sharding())
