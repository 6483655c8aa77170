"""Entropies of the frozen targets: what a model must beat to have learned anything.

Both are in nats per target token, over the very targets that are evaluated, those that stand for bytes of
text (sentinels, EOS and padding apart). Divide by `bytes_per_target` for nats per byte.
"""

from collections.abc import Iterable

import numpy as np


def unigram_entropy(records: Iterable[dict]) -> float:
  """H(target): the loss of the best model that ignores all context, fitted on these targets."""
  targets_N, _, _ = _pairs(records)
  return _entropy(targets_N)


def bigram_entropy(records: Iterable[dict]) -> float:
  """H(target | the decoder's input before it), plug-in estimate.

  It is fitted on the targets it is measured on, so it underestimates: with few targets a large vocabulary
  makes nearly every pair unique and the figure falls towards 0. Byte targets of 1 MB are safe.
  """
  targets_N, inputs_N, _ = _pairs(records)
  return _entropy(inputs_N * (1 + targets_N.max(initial=0)) + targets_N) - _entropy(inputs_N)


def bytes_per_target(records: Iterable[dict]) -> float:
  """Mean UTF-8 bytes of a target that stands for text."""
  _, _, bytes_N = _pairs(records)
  return float(bytes_N.mean()) if len(bytes_N) else 0.0


def _pairs(records: Iterable[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  fields = [(np.asarray(r["targets"]), np.asarray(r["decoder_inputs"]), np.asarray(r["target_bytes"]))
            for r in records]
  found = [(t[b > 0], i[b > 0], b[b > 0]) for t, i, b in fields]
  return tuple(np.concatenate([f[j] for f in found]).astype(np.int64) if found else np.zeros(0, np.int64)
               for j in range(3))


def _entropy(x_N: np.ndarray) -> float:
  _, count = np.unique(x_N, return_counts=True)
  p = count / max(len(x_N), 1)
  return float(-(p * np.log(p)).sum())
