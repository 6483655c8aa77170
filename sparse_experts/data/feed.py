"""Batches on devices: row r of step s is record s * B + r, whatever the mesh and the number of hosts."""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from sparse_experts.errors import UserError


def in_time(function: Callable[[], Any], seconds: float, what: str) -> Any:
  """`function()`, or a UserError that names this process if it takes longer; it is then left alone."""
  answer: queue.Queue = queue.Queue()

  def work():
    try:
      answer.put((function(), None))
    except BaseException as e:
      answer.put((None, e))

  threading.Thread(target=work, name=what, daemon=True).start()
  result, failure = _wait(answer, seconds, what)
  if failure is not None:
    raise failure
  return result


def _wait(answers: queue.Queue, seconds: float, what: str) -> Any:
  try:
    return answers.get(timeout=min(seconds, threading.TIMEOUT_MAX))
  except queue.Empty:
    raise UserError(
        f"process {jax.process_index()} of {jax.process_count()} waited {seconds:g} seconds for {what}; see "
        "what data.source is waiting for, or raise train.input_timeout") from None


class Feed(Iterator[dict[str, jax.Array]]):
  """Iterator over global batches from `start_step` on; a thread loads `prefetch` of them ahead.

  A host reads only the rows that its devices hold, each once. An exception in the thread is raised to
  whoever asks for the next batch, a UserError if none comes for `timeout` seconds. The position is the
  step number; nothing else needs saving.
  """

  def __init__(self, dataset, batch_size: int, sharding, start_step: int = 0, prefetch: int = 2,
               timeout: float = math.inf):
    _check(batch_size, sharding)
    self._step, self._timeout = start_step, timeout
    self._dataset, self._batch_size, self._sharding = dataset, batch_size, sharding
    self._queue: queue.Queue = queue.Queue(maxsize=max(prefetch, 1))
    self._closed = threading.Event()
    self._failure: BaseException | None = None
    self._thread = threading.Thread(target=self._work, args=(start_step,), name="feed", daemon=True)
    self._thread.start()

  def __next__(self) -> dict[str, jax.Array]:
    if self._failure is None and not self._closed.is_set():
      self._step += 1
      batch, self._failure = _wait(self._queue, self._timeout, f"the data of step {self._step}")
    if self._failure is not None:
      raise self._failure
    if self._closed.is_set():
      raise StopIteration
    return batch

  def close(self) -> None:
    """Stops the thread and waits for it, but not for a source that does not answer."""
    self._closed.set()
    self._thread.join(timeout=1.0)

  def _work(self, step: int) -> None:
    try:
      while not self._closed.is_set():
        self._put((load(self._dataset, step * self._batch_size, self._batch_size, self._sharding), None))
        step += 1
    except BaseException as e:
      self._put((None, e))

  def _put(self, item) -> None:
    while not self._closed.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        break
      except queue.Full:
        pass


def eval_batches(dataset, batch_size: int, sharding, num_records: int | None = None,
                 set_size: int | None = None) -> Iterator[dict]:
  """The first `num_records` records (all, if there are fewer) in order; zero rows fill the last batch.

  set_size: records of a batch, `batch_size` by default; zero rows fill what is left of it.
  """
  _check(batch_size, sharding)
  n = len(dataset) if num_records is None else min(num_records, len(dataset))
  set_size = set_size or batch_size
  for start in range(0, n, set_size):
    yield load(dataset, start, batch_size, sharding, stop=min(start + set_size, n))


def load(dataset, start: int, batch_size: int, sharding, stop: int | None = None) -> dict[str, jax.Array]:
  """Records start, start + 1, ... as one global batch; rows from record `stop` on are zero."""
  rows = local_rows(sharding, batch_size)
  records = [dataset[start + r] for r in rows if stop is None or start + r < stop]
  like = records[0] if records else dataset[0]
  _check_alike({start + r: record for r, record in zip(rows, records)})
  place = {r: i for i, r in enumerate(rows)}  # a device's rows are consecutive in both

  def to_devices(name):
    shape, dtype = np.shape(like[name]), np.asarray(like[name]).dtype
    local = np.zeros((len(rows), *shape), dtype)
    if records:
      np.stack([record[name] for record in records], out=local[:len(records)])

    def on_device(index):
      first, last, _ = index[0].indices(batch_size)
      return local[(slice(place[first], place[first] + last - first), *index[1:])]

    return jax.make_array_from_callback((batch_size, *shape), sharding, on_device)

  return {name: to_devices(name) for name in like}


def _check_alike(records: dict[int, dict]) -> None:
  """Refuses records whose arrays differ in name, shape or type; numpy would stretch or cast some of them."""
  shape = lambda x: (x.dtype, x.shape) if hasattr(x, "dtype") else (np.asarray(x).dtype, np.shape(x))
  shapes = {i: {name: shape(x) for name, x in record.items()} for i, record in records.items()}
  show = lambda arrays, name: "{} {}".format(*arrays[name]) if name in arrays else "absent"
  for i, arrays in shapes.items():
    first, like = next(iter(shapes.items()))
    if arrays == like:
      continue
    name = next(n for n in sorted(arrays.keys() | like.keys()) if arrays.get(n) != like.get(n))
    raise UserError(f"record {i} has {name} {show(arrays, name)}, record {first} has it "
                    f"{show(like, name)}; give every record the same arrays")


def local_rows(sharding, batch_size: int) -> list[int]:
  """The rows of a global batch that this host's devices hold, sorted, each once."""
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  return sorted({r for (rows,) in indices for r in range(*rows.indices(batch_size))})


def _check(batch_size: int, sharding) -> None:
  try:
    sharding.shard_shape((batch_size,))
  except ValueError as e:
    axes = sharding.spec[0] if isinstance(sharding.spec[0], tuple) else (sharding.spec[0],)
    shards = math.prod(sharding.mesh.shape[a] for a in axes)
    raise UserError(f"a batch of {batch_size} rows does not divide over mesh axes "
                    f"{' x '.join(axes)} = {shards}; "
                    f"choose {-(-batch_size // shards) * shards}, or a smaller mesh") from e
