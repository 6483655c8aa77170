"""Entropies of targets, against figures worked out by hand."""

import math

import numpy as np
import pytest

from sparse_experts.data.text.statistics import bigram_entropy, unigram_entropy


def record(targets, inputs, target_bytes):
  return dict(targets=np.array(targets), decoder_inputs=np.array(inputs), target_bytes=np.array(target_bytes))


def test_even_tokens_that_their_predecessor_decides():
  # a b a b ...: one bit alone, nothing left once the token before is known.
  records = [record([4, 5, 4, 5], [5, 4, 5, 4], [1, 1, 1, 1])] * 3
  assert unigram_entropy(records) == pytest.approx(math.log(2))
  assert bigram_entropy(records) == pytest.approx(0, abs=1e-12)


def test_conditional_entropy_by_hand():
  # After 4: 4, 5 evenly (half of the targets); after 5: always 6.
  records = [record([4, 5, 6, 6], [4, 4, 5, 5], [1, 2, 1, 2])]
  assert unigram_entropy(records) == pytest.approx(.25 * math.log(4) * 2 + .5 * math.log(2))
  assert bigram_entropy(records) == pytest.approx(.5 * math.log(2))


def test_targets_without_bytes_do_not_count():
  text = [4, 5, 4, 4]
  alone = [record(text, [0, 4, 5, 4], [1] * 4)]
  among = [record([*text, 358, 1, 0], [0, 4, 5, 4, 4, 358, 0], [1] * 4 + [0] * 3)]
  assert unigram_entropy(among) == unigram_entropy(alone)
  assert bigram_entropy(among) == bigram_entropy(alone)


def test_bigram_is_below_unigram_and_nothing_is_zero():
  rng = np.random.default_rng(0)
  x = rng.integers(3, 9, 1000)
  records = [record(x[1:], x[:-1], np.ones(999))]
  assert 0 < bigram_entropy(records) < unigram_entropy(records) <= math.log(6)
  assert unigram_entropy([]) == 0
