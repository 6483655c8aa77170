"""Packed windows hold the documents, and every token knows its document and its place in it."""

import numpy as np
import pytest

from sparse_experts.data import make_tokenizer
from sparse_experts.data.text import packing

TOKENIZER = make_tokenizer("bytes")
TEXTS = [b"abcdefghij", b"k", b"lm", b"nopqrstuvwxyz" * 3, b"0123", b"45"]
DOMAINS = [1, 0, 1, 0, 1, 0]
DOCUMENTS = [dict(text=t, domain=d) for t, d in zip(TEXTS, DOMAINS)]
LENGTH = 8


@pytest.fixture(scope="module")
def records():
  stream = packing.concatenate(DOCUMENTS, TOKENIZER, append_eos=True)
  windows = packing.cut(stream, LENGTH)
  return [packing.causal_record(stream, w, LENGTH, TOKENIZER.byte_lengths) for w in windows]


def test_windows_hold_the_documents_in_order(records):
  for domain in (0, 1):
    ids = np.concatenate([r["targets"][r["weights"] > 0] for r in records if r["domain"] == domain])
    texts = [t for t, d in zip(TEXTS, DOMAINS) if d == domain]
    assert ids.tolist() == [i for t in texts for i in (*TOKENIZER.encode(t).tolist(), 1)]


def test_only_the_last_window_of_a_domain_is_short(records):
  full = [int(r["weights"].sum()) for r in records]
  domains = [int(r["domain"]) for r in records]
  last = [i for i, d in enumerate(domains) if d not in domains[i + 1:]]
  assert len(last) == 2
  assert all(n == LENGTH for i, n in enumerate(full) if i not in last)


def test_segments_and_positions_against_a_loop(records):
  """Written as a walk over single tokens, which knows nothing of array arithmetic."""
  for r in records:
    segment, position, begin = 1, 0, False
    for t in range(LENGTH):
      if not r["weights"][t]:
        assert all(x[t] == 0 for name, x in r.items() if name != "domain")
        continue
      if begin:
        segment, position = segment + 1, 0
      assert (r["segments"][t], r["positions"][t]) == (segment, position)
      position, begin = position + 1, r["targets"][t] == 1


def test_inputs_are_the_tokens_before_the_targets(records):
  """BOS where a document starts, and the token of the window before where one continues."""
  starts_document, previous, domain = True, 0, records[0]["domain"]
  continued = 0
  for r in records:
    if r["domain"] != domain:
      starts_document, domain = True, r["domain"]
    for t in np.flatnonzero(r["weights"]):
      assert r["decoder_inputs"][t] == (0 if starts_document else previous)
      continued += t == 0 and not starts_document
      previous = r["targets"][t]
      starts_document = previous == 1
  assert continued > 3


def test_bytes_add_up(records):
  assert sum(int(r["target_bytes"].sum()) for r in records) == sum(map(len, TEXTS))
  assert all(r["target_bytes"][r["targets"] == 1].sum() == 0 for r in records)


def test_empty_documents_leave_no_hole_in_segments():
  # An empty text without EOS has no token at all.
  documents = [dict(text=t, domain=0) for t in (b"ab", b"", b"", b"cd")]
  stream = packing.concatenate(documents, TOKENIZER, append_eos=False)
  record = packing.causal_record(stream, packing.cut(stream, 4)[0], 4, TOKENIZER.byte_lengths)
  assert record["segments"].tolist() == [1, 1, 2, 2]
  assert record["positions"].tolist() == [0, 1, 0, 1]
  assert record["decoder_inputs"].tolist() == [0, 100, 0, 102]
