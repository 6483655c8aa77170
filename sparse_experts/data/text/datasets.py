"""Records of text: windows of a split's documents laid end to end, as records of a causal or a span model."""

import numpy as np

from sparse_experts.config import seeds
from sparse_experts.data.dataset import VALID_SEED, Dataset, Record, make_records
from sparse_experts.data.sources import Source
from sparse_experts.data.text import packing, span_corruption
from sparse_experts.data.text.packing import Stream
from sparse_experts.data.text.tokenizer import Tokenizer
from sparse_experts.errors import UserError


class CausalRows:
  """A window's tokens as targets, the tokens before them as inputs; documents end with EOS.

  window: raw tokens of a window. encoder, targets: lengths of a record's rows, 0 for what it has not.
  """

  append_eos, encoder = True, 0

  def __init__(self, config_data, tokenizer: Tokenizer):
    if config_data.length < 1:
      raise UserError(f"data.length={config_data.length} must be at least 1")
    self.window = self.targets = config_data.length
    self._byte_lengths, self._bos_id = tokenizer.byte_lengths, tokenizer.bos_id

  def record(self, stream: Stream, window: np.ndarray, seed: list[int]) -> Record:
    """The record of a window (start, stop, domain); `seed` draws what is random in it."""
    return packing.causal_record(stream, window, self.targets, self._byte_lengths, self._bos_id)

  def documents(self, stream: Stream, window: np.ndarray) -> np.ndarray:
    """The number of each target's document."""
    return packing.pad(stream.document(np.arange(*window[:2])), self.targets)


class SpanRows:
  """A window with spans masked in the encoder's inputs and listed in the targets; see `CausalRows`.

  T5 joins documents without a mark before it corrupts: EOS ends inputs and targets and stands nowhere else.
  """

  append_eos = False

  def __init__(self, config_data, tokenizer: Tokenizer):
    c = config_data
    self._mean_span = c.mean_span or (20.0 if tokenizer.name == "bytes" else 3.0)
    self._noise_density, self._tokenizer, self.encoder = c.noise_density, tokenizer, c.length
    self.window, self.targets = span_corruption.check(
        c.length, c.noise_density, self._mean_span, tokenizer.num_sentinels, c.target_length)

  def record(self, stream: Stream, window: np.ndarray, seed: list[int]) -> Record:
    """As of `CausalRows`; `seed` draws the spans."""
    start, stop, domain = window
    return span_corruption.corrupted_record(
        stream.ids_N[start:stop], domain, length=self.encoder, target_length=self.targets,
        noise_density=self._noise_density, mean_span=self._mean_span, tokenizer=self._tokenizer,
        rng=np.random.default_rng(seed))

  def documents(self, stream: Stream, window: np.ndarray) -> np.ndarray:
    """One for all targets, that of the window's middle: a window is not cut where documents meet."""
    start, stop, _ = window
    return stream.document(np.array([(start + stop) // 2]))


Rows = CausalRows | SpanRows


def make_dataset(config, split: str, tokenizer: Tokenizer, source: Source, rows: Rows) -> Dataset:
  """The records of `source.train` or `source.valid`.

  The masked spans of a training record follow from `config.seed.data` and its number; those of a validation
  record are the same in every run.
  """
  stream = packing.concatenate(source.part(split), tokenizer, append_eos=rows.append_eos)
  window_W3 = packing.cut(stream, rows.window)
  if not len(window_W3):
    raise UserError(f"data.source='{config.data.source}' has no {split} text; give it more documents")
  seed = seeds(config)["data"] if split == "train" else VALID_SEED
  return make_records(
      config, split, len(window_W3), lambda i, w: rows.record(stream, window_W3[w], [seed, i]),
      documents=lambda w: rows.documents(stream, window_W3[w]))


def example(rows: Rows) -> Record:
  """A record of made-up ids, no text being read: names, shapes and types are those of all records."""
  stream = Stream(np.zeros(rows.window, np.int32), np.array([rows.window]), np.zeros(1, np.int32))
  return rows.record(stream, np.array([0, rows.window, 0]), [0])
