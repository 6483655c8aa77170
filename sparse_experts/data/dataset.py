"""Records of a split by number: an endless shuffled stream for training, a frozen list for validation."""

from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_experts.config import seeds

VALID_SEED = 1  # of the frozen list: the same whatever the run's seed
Record = dict[str, Any]  # arrays by name


class Dataset:
  """Record i is a dict of arrays, and always the same one.

  `num_windows` is the number of different windows: an epoch of the train stream, or the whole frozen list.
  A window is what a record is made of: a stretch of text, an image, a pair.
  """

  def __init__(self, get: Callable[[int], Record], length: int, num_windows: int,
               documents: Callable[[int], np.ndarray] | None = None):
    self._get, self._length, self.num_windows = get, length, num_windows
    self._documents = documents

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, i: int) -> Record:
    if not 0 <= i < self._length:
      raise IndexError(f"record {i} of {self._length}")
    return self._get(int(i))

  def documents(self, i: int) -> np.ndarray:
    """The number of the document that each target of record i is from, [targets], or [1] for all of them.

    Targets of one document are not independent draws. An image or a pair is a document by itself.
    """
    return np.array([i]) if self._documents is None else self._documents(int(i))


def make_records(config, split: str, num_windows: int, record: Callable[[int, int], Record],
                 length: int | None = None,
                 documents: Callable[[int], np.ndarray] | None = None) -> Dataset:
  """Records of a split's windows. record: (number of the record, its window) -> the record.

  train: endless, a new permutation of all windows in each epoch, which follows from `config.seed.data` alone.
  valid: every window once, in an order drawn once for all runs: so the first n are a sample of all.
  length: of this list, if what is last in the order is left out.
  documents: window -> see `Dataset.documents`; known of validation records only.
  """
  if split == "train":
    import grain  # here: a config is checked before anything heavy is imported

    endless = grain.MapDataset.range(num_windows).seed(seeds(config)["data"]).shuffle().repeat()
    endless = endless.map_with_index(record)
    return Dataset(endless.__getitem__, len(endless), num_windows)
  order_W = np.random.default_rng(VALID_SEED).permutation(num_windows)[:length]
  return Dataset(lambda i: record(i, order_W[i]), len(order_W), len(order_W),
                 documents and (lambda i: documents(order_W[i])))
