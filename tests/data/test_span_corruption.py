"""Span corruption loses nothing, hides the share it promises, and has exactly the length asked for."""

import numpy as np
import pytest

from sparse_experts.data import make_tokenizer
from sparse_experts.data.text import span_corruption
from sparse_experts.errors import UserError

TOKENIZER = make_tokenizer("bytes")
SENTINELS = [TOKENIZER.sentinel(i) for i in range(100)]


def fill(inputs, targets):
  """Puts the spans of the targets back where their sentinels stand in the inputs."""
  spans, current = {}, None
  for t in targets[:-1]:
    if t in SENTINELS:
      current = spans.setdefault(t, [])
    else:
      current.append(t)
  return [t for i in inputs[:-1] for t in (spans[i] if i in SENTINELS else [i])]


@pytest.mark.parametrize("length", [2, 3, 7, 50, 568])
@pytest.mark.parametrize("mean_span", [1.0, 3.0, 20.0])
def test_inverts(length, mean_span):
  rng = np.random.default_rng(length)
  ids = rng.integers(3, 259, length)
  for _ in range(5):
    mask = span_corruption.random_spans_noise_mask(length, .15, mean_span, rng)
    inputs, targets = span_corruption.corrupt(ids, mask, SENTINELS, 1)
    assert fill(inputs.tolist(), targets.tolist()) == ids.tolist()
    assert inputs[-1] == targets[-1] == 1 and not mask[0] and mask[-1]


def test_sentinels_count_up_from_zero_in_both():
  ids, mask = np.arange(10, 18), np.array([0, 1, 1, 0, 0, 1, 0, 1], bool)
  inputs, targets = span_corruption.corrupt(ids, mask, SENTINELS, 1)
  assert inputs.tolist() == [10, 358, 13, 14, 357, 16, 356, 1]
  assert targets.tolist() == [358, 11, 12, 357, 15, 356, 17, 1]


@pytest.mark.parametrize("mean_span", [3.0, 20.0])
def test_density_and_mean_span(mean_span):
  rng = np.random.default_rng(0)
  masks = [span_corruption.random_spans_noise_mask(600, .15, mean_span, rng) for _ in range(200)]
  spans = [np.count_nonzero(np.diff(m.astype(int), prepend=0) == 1) for m in masks]
  assert {int(m.sum()) for m in masks} == {90}  # the number is fixed, its places are drawn
  assert np.mean(spans) == pytest.approx(90 / mean_span, abs=.51)  # rounded to whole spans
  # Places are hidden about equally often, away from the ends: the last span always lies at the very end.
  middle = np.mean(masks, axis=0)[100:-100]
  assert middle.mean() == pytest.approx((90 - mean_span) / (600 - mean_span), abs=.02)
  assert abs(middle[:200].mean() - middle[200:].mean()) < .02
  assert len({m.tobytes() for m in masks}) == 200


@pytest.mark.parametrize(("density", "mean_span"), [(.15, 1.), (.15, 3.), (.15, 20.), (.4, 1.), (.5, 3.)])
def test_encoder_inputs_have_exactly_the_length(mean_span, density):
  rng = np.random.default_rng(1)
  for length in range(3, 130):
    raw, target_length = span_corruption.raw_length(length, density, mean_span)
    mask = span_corruption.random_spans_noise_mask(raw, density, mean_span, rng)
    inputs, targets = span_corruption.corrupt(np.full(raw, 7), mask, SENTINELS, 1)
    assert (len(inputs), len(targets)) == (length, target_length)


def test_published_lengths():
  """T5: 512 tokens of input are 568 of text, and 114 targets."""
  assert span_corruption.raw_length(512, .15, 3.0) == (568, 114)
  assert span_corruption.span_counts(597, .15, 3.0) == (90, 30)  # 89.55 and 29.85, rounded


def test_record():
  text = b"the quick brown fox jumps over the lazy dog " * 3
  ids = TOKENIZER.encode(text)
  record = span_corruption.corrupted_record(
      ids, 4, length=140, target_length=60, noise_density=.15, mean_span=3.0, tokenizer=TOKENIZER,
      rng=np.random.default_rng(0))
  inputs = record["encoder_inputs"][record["encoder_segments"] > 0]
  targets = record["targets"][record["segments"] > 0]
  assert bytes(i - 3 for i in fill(inputs.tolist(), targets.tolist())) == text
  # Masked bytes are the targets' bytes: sentinels, EOS and padding stand for none.
  hidden = len(text) - np.count_nonzero(record["encoder_inputs"] >= 3) + np.isin(inputs, SENTINELS).sum()
  assert record["target_bytes"].sum() == hidden
  assert not record["target_bytes"][np.isin(record["targets"], [0, 1, *SENTINELS])].any()
  np.testing.assert_array_equal(record["decoder_inputs"][1:len(targets)], targets[:-1])
  np.testing.assert_array_equal(record["weights"], record["segments"])
  assert record["decoder_inputs"][0] == 0 and record["domain"] == 4
  assert record["positions"][:len(targets)].tolist() == list(range(len(targets)))


def test_window_of_one_token():
  record = span_corruption.corrupted_record(
      [65], 0, length=8, target_length=8, noise_density=.15, mean_span=3.0, tokenizer=TOKENIZER,
      rng=np.random.default_rng(0))
  assert record["encoder_inputs"].tolist() == [65, 1] + [0] * 6
  assert record["targets"].tolist() == [1] + [0] * 7


@pytest.mark.parametrize(("change", "words"), [
    (dict(length=4096), "227 spans but there are 100 sentinels; raise data.mean_span=3"),
    (dict(length=2), "data.length=2 is too short"),
    (dict(noise_density=1.0), "data.noise_density=1.0 must be between"),
    (dict(mean_span=0.5), "data.mean_span=0.5 must be at least 1"),
    (dict(mean_span=1.0, noise_density=.5), "spans have a token between them"),
    (dict(target_length=100), "data.target_length=100 .* use 114 or more"),
])
def test_mistakes(change, words):
  args = dict(length=512, noise_density=.15, mean_span=3.0, num_sentinels=100) | change
  with pytest.raises(UserError, match=words):
    span_corruption.check(**args)
