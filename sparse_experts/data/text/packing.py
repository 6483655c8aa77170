"""Documents concatenated into one array of ids, and windows of it as records of a causal model."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sparse_experts.data.dataset import Record


@dataclasses.dataclass(frozen=True)
class Stream:
  """All documents of a split end to end, those of one domain next to each other."""

  ids_N: np.ndarray
  end_D: np.ndarray  # end of each document in ids_N
  domain_D: np.ndarray

  @property
  def start_D(self) -> np.ndarray:
    return np.concatenate([[0], self.end_D[:-1]]).astype(np.int64)

  def document(self, place_N: np.ndarray) -> np.ndarray:
    """The number of the document that holds each place of ids_N."""
    return np.searchsorted(self.end_D, place_N, side="right")


def concatenate(documents: Sequence[dict], tokenizer, *, append_eos: bool) -> Stream:
  """All documents end to end, tokenized in one pass; by domain, within a domain in the order given."""
  domain_D = np.array([documents[i]["domain"] for i in range(len(documents))], np.int32)
  order_D = np.argsort(domain_D, kind="stable")
  texts = [documents[i]["text"] for i in order_D.tolist()]
  ids_N, end_D = tokenizer.encode_documents(texts, append_eos=append_eos)
  return Stream(ids_N, end_D, domain_D[order_D])


def cut(stream: Stream, length: int) -> np.ndarray:
  """Windows as rows (start, stop, domain): consecutive, of `length` tokens, each of a single domain.

  Only the last window of a domain is shorter; it holds what is left, at least one token.
  """
  windows = []
  for domain in np.unique(stream.domain_D):
    of_domain = np.flatnonzero(stream.domain_D == domain)
    first, last = int(stream.start_D[of_domain[0]]), int(stream.end_D[of_domain[-1]])
    start = np.arange(first, last, length, dtype=np.int64)
    windows.append(np.stack([start, np.minimum(start + length, last), np.full_like(start, domain)], axis=1))
  return np.concatenate(windows) if windows else np.zeros((0, 3), np.int64)


def causal_record(stream: Stream, window, length: int, byte_lengths: np.ndarray,
                  bos_id: int | None = 0) -> Record:
  """One window as targets, with the tokens before them as inputs.

  Each document of the window is a segment of its own (1, 2, ...; 0 is padding), with positions from 0.
  The input before a document's first token is BOS; where there is none, its place is padding. A window that
  begins inside a document starts with the token before it instead: BOS means the start of a text and nothing
  else, and every target but the first of a document has its true predecessor as input.
  """
  start, stop, domain = (int(i) for i in window)
  n = stop - start
  targets_L = pad(stream.ids_N[start:stop], length)
  document_n = stream.document(np.arange(start, stop))
  start_n = stream.start_D[document_n] if n else document_n
  previous_n = stream.ids_N[np.maximum(np.arange(start, stop) - 1, 0)]
  is_first_n = start_n == np.arange(start, stop)
  inputs_n = np.where(is_first_n, bos_id or 0, previous_n)
  # Empty documents would leave holes in the numbers, so count the changes.
  segments_n = 1 + np.cumsum(np.diff(document_n, prepend=document_n[:1]) != 0)
  positions_n = np.arange(start, stop) - np.maximum(start_n, start)
  real_n = ~is_first_n if bos_id is None else np.ones(n, bool)
  return dict(
      decoder_inputs=pad(inputs_n, length), targets=targets_L,
      weights=pad(real_n, length, np.float32),
      segments=pad(segments_n * real_n, length),
      positions=pad(positions_n, length),
      target_bytes=pad(byte_lengths[stream.ids_N[start:stop]] * real_n, length), domain=np.int32(domain))


def pad(x_n: np.ndarray, length: int, dtype=np.int32) -> np.ndarray:
  """`x_n` with zeros behind it."""
  out_L = np.zeros(length, dtype)
  out_L[:len(x_n)] = x_n
  return out_L
