"""Unigram and bigram entropy of validation targets: baselines that a trained model should be below.

Both are in nats per target token, over the very targets that are evaluated: those that stand for bytes of
text, without sentinels, EOS and padding.
"""

from collections.abc import Iterable

import numpy as np


def unigram_entropy(records: Iterable[dict]) -> float:
  """H(target): the loss of the best model that ignores all context, fitted on these targets."""
  targets_N, _ = _pairs(records)
  return _entropy(targets_N)


def bigram_entropy(records: Iterable[dict]) -> float:
  """H(target | the decoder's input before it), plug-in estimate.

  It is fitted on the targets it is measured on, so it underestimates: with few targets a large vocabulary
  makes nearly every pair unique and the figure falls towards 0. Byte targets of 1 MB are safe.
  """
  targets_N, inputs_N = _pairs(records)
  return _entropy(inputs_N * (1 + targets_N.max(initial=0)) + targets_N) - _entropy(inputs_N)


def _pairs(records: Iterable[dict]) -> tuple[np.ndarray, np.ndarray]:
  """(targets, decoder inputs) of all targets that stand for text."""
  records = list(records)
  text = lambda field: np.concatenate([np.zeros(0, np.int64), *(
      np.asarray(r[field])[np.asarray(r["target_bytes"]) > 0] for r in records)])
  return text("targets"), text("decoder_inputs")


def _entropy(x_N: np.ndarray) -> float:
  """Of the relative frequencies of its values, in nats."""
  _, count = np.unique(x_N, return_counts=True)
  p = count / max(len(x_N), 1)
  return float(-(p * np.log(p)).sum())
