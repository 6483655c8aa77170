"""Records of a split: an endless shuffled stream for training, a frozen list for validation."""

from collections.abc import Callable

import grain
import numpy as np

from sparse_experts.config import seeds
from sparse_experts.data.text import packing, span_corruption
from sparse_experts.errors import UserError, nearest

VALID_SEED = 1  # of the frozen list: the same whatever the run's seed


class Dataset:
  """Record i is a dict of arrays, and always the same one.

  `num_windows` is the number of different windows: an epoch of the train stream, or the whole frozen list.
  """

  def __init__(self, get: Callable[[int], dict], length: int, num_windows: int):
    self._get, self._length, self.num_windows = get, length, num_windows

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    if not 0 <= i < self._length:
      raise IndexError(f"record {i} of {self._length}")
    return self._get(int(i))

  def records_for_bytes(self, min_bytes: int) -> int:
    """How many records, from the first on, hold targets of `min_bytes` bytes; all if there are fewer."""
    total = 0
    for i in range(self.num_windows):
      total += int(self[i]["target_bytes"].sum())
      if total >= min_bytes:
        return i + 1
    return self.num_windows


def lengths(config_data, tokenizer) -> dict[str, int]:
  """Length of the encoder's inputs (0 for `causal`) and of the targets, and raw tokens of one window."""
  c = config_data
  if c.objective == "causal":
    if c.length < 1:
      raise UserError(f"data.length={c.length} must be at least 1")
    return dict(encoder=0, targets=c.length, raw=c.length)
  if c.objective == "span_corruption":
    raw, targets = span_corruption.check(
        c.length, c.noise_density, mean_span(c, tokenizer), tokenizer.num_sentinels, c.target_length)
    return dict(encoder=c.length, targets=targets, raw=raw)
  raise UserError(f"data.objective='{c.objective}' is unknown"
                  + nearest(c.objective, ["causal", "span_corruption"]))


def mean_span(config_data, tokenizer) -> float:
  return config_data.mean_span or (20.0 if tokenizer.name == "bytes" else 3.0)


def make_dataset(config, split: str, tokenizer, source) -> Dataset:
  """The records of `source.train` or `source.valid` for `config.data.objective`.

  `train`: record i of an endless stream which is a new permutation of all windows in each epoch; the
  order and the masked spans come from `config.seed.data` and i alone. `valid`: every window once, in a
  fixed order drawn once for all runs (so the first n are a sample of all), with fixed spans.
  """
  if split not in ("train", "valid"):
    raise UserError(f"split '{split}' is unknown" + nearest(split, ["train", "valid"]))
  c, causal = config.data, config.data.objective == "causal"
  size = lengths(c, tokenizer)
  # T5 joins documents without a mark before it corrupts: EOS ends the targets and nothing else.
  stream = packing.lay_out(getattr(source, split), tokenizer, append_eos=causal)
  window_W3 = packing.cut(stream, size["raw"])
  if not len(window_W3):
    raise UserError(f"data.source='{c.source}' has no {split} text; give it more documents")
  seed = seeds(config)["data"] if split == "train" else VALID_SEED

  def record(i: int, w: int) -> dict[str, np.ndarray]:
    return _record(c, tokenizer, size, stream, window_W3[w], [seed, i])

  num_windows = len(window_W3)
  if split == "train":
    endless = grain.MapDataset.range(num_windows).seed(seed).shuffle().repeat().map_with_index(record)
    return Dataset(endless.__getitem__, len(endless), num_windows)
  order_W = np.random.default_rng(seed).permutation(num_windows)
  return Dataset(lambda i: record(i, order_W[i]), num_windows, num_windows)


def example(config_data, tokenizer) -> dict[str, np.ndarray]:
  """A record of made-up ids, no text being read: names, shapes and types are those of all records."""
  size = lengths(config_data, tokenizer)
  raw = size["raw"]
  stream = packing.Stream(np.zeros(raw, np.int32), np.array([raw]), np.zeros(1, np.int32))
  return _record(config_data, tokenizer, size, stream, (0, raw, 0), 0)


def _record(c, tokenizer, size, stream: packing.Stream, window, seed) -> dict[str, np.ndarray]:
  """One window as a record of `c.objective`; `seed` draws its masked spans."""
  if c.objective == "causal":
    return packing.causal_record(stream, window, c.length, tokenizer.byte_lengths)
  return span_corruption.corrupted_record(
      stream.ids_N[window[0]:window[1]], window[2], length=c.length,
      target_length=size["targets"], noise_density=c.noise_density, mean_span=mean_span(c, tokenizer),
      tokenizer=tokenizer, rng=np.random.default_rng(seed))
