"""T5's span corruption: random spans leave the input, a sentinel in their place; the target lists them.

Raffel et al. 2020, section 3.1.4; the mask and the lengths follow the published
`random_spans_noise_mask` and `random_spans_helper`.
"""

import numpy as np

from sparse_experts.data.dataset import Record
from sparse_experts.data.text.packing import pad
from sparse_experts.errors import UserError


def span_counts(raw_length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
  """(tokens that are masked, spans they form) of `raw_length` tokens; at least one token stays and goes."""
  noise = min(max(round(raw_length * noise_density), 1), raw_length - 1)
  spans = max(round(noise / mean_span), 1)
  return noise, min(spans, noise, raw_length - noise)


def raw_length(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
  """(raw tokens, target length) for encoder inputs of exactly `length` tokens, EOS included in both.

  One more raw token adds no or one token to the inputs, so every length from 3 on is met exactly; `check`
  refuses the settings (half of the tokens or more in spans of one) for which that is not so.
  """
  raw = 2
  while True:
    noise, spans = span_counts(raw + 1, noise_density, mean_span)
    if raw + 1 - noise + spans + 1 > length:
      break
    raw += 1
  noise, spans = span_counts(raw, noise_density, mean_span)
  return raw, noise + spans + 1


def check(length: int, noise_density: float, mean_span: float, num_sentinels: int,
          target_length: int | None = None) -> tuple[int, int]:
  """(raw tokens, target length), or a UserError about the numbers that cannot be."""
  if length < 3:
    raise UserError(f"data.length={length} is too short for span corruption; use 3 or more")
  if not 0 < noise_density < 1:
    raise UserError(f"data.noise_density={noise_density} must be between 0 and 1, say 0.15")
  if mean_span < 1 or noise_density / mean_span >= 1 - noise_density:
    raise UserError(f"data.mean_span={mean_span} must be at least 1, and long enough that spans have a token "
                    f"between them at data.noise_density={noise_density}")
  raw, needed = raw_length(length, noise_density, mean_span)
  _, spans = span_counts(raw, noise_density, mean_span)
  if spans > num_sentinels:
    raise UserError(f"data.length={length} needs {spans} spans but there are {num_sentinels} sentinels; "
                    f"raise data.mean_span={mean_span:g} or shorten the length")
  if target_length is not None and target_length < needed:
    raise UserError(f"data.target_length={target_length} does not hold the spans of data.length={length}; "
                    f"use {needed} or more, or leave it unset")
  return raw, target_length or needed


def random_spans_noise_mask(length: int, noise_density: float, mean_span: float, rng) -> np.ndarray:
  """Boolean mask of `length` tokens: spans of kept and masked tokens in turn, kept first, masked last."""
  noise, spans = span_counts(length, noise_density, mean_span)
  kept_S = _random_partition(length - noise, spans, rng)
  masked_S = _random_partition(noise, spans, rng)
  return np.repeat(np.tile([False, True], spans), np.stack([kept_S, masked_S], axis=1).ravel())


def _random_partition(total: int, parts: int, rng) -> np.ndarray:
  """`parts` positive lengths that add up to `total`, uniformly among all such."""
  cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
  return np.diff(cuts, prepend=0, append=total)


def corrupt(ids_n: np.ndarray, mask_n: np.ndarray, sentinel_S: np.ndarray, eos_id: int):
  """(inputs, targets), each ended by EOS: span i leaves the inputs, where sentinel i stands for it, and
  follows sentinel i in the targets."""
  starts_n = mask_n & ~np.concatenate([[False], mask_n[:-1]])
  sentinel_n = np.asarray(sentinel_S)[np.cumsum(starts_n) - 1]
  inputs = np.where(starts_n, sentinel_n, ids_n)[~mask_n | starts_n]
  # Each span's first token is preceded by its sentinel: two columns, kept where they hold something.
  columns = np.stack([sentinel_n, ids_n], axis=1)
  targets = columns[np.stack([starts_n, mask_n], axis=1)]
  return np.append(inputs, eos_id), np.append(targets, eos_id)


def corrupted_record(ids_n, domain, *, length: int, target_length: int, noise_density: float,
                     mean_span: float, tokenizer, rng) -> Record:
  """One window as a record of an encoder-decoder, all of it one segment. Windows of a single token, at the
  very end of a split, keep it and have only EOS as target."""
  ids_n = np.asarray(ids_n, np.int32)
  mask_n = (random_spans_noise_mask(len(ids_n), noise_density, mean_span, rng) if len(ids_n) > 1
            else np.zeros(len(ids_n), bool))
  sentinel_S = np.array([tokenizer.sentinel(i) for i in range(tokenizer.num_sentinels)], np.int32)
  inputs, targets = corrupt(ids_n, mask_n, sentinel_S, tokenizer.eos_id)
  i, t = np.arange(len(inputs)), np.arange(len(targets))
  return dict(
      encoder_inputs=pad(inputs, length), encoder_segments=pad(np.ones_like(i), length),
      encoder_positions=pad(i, length),
      decoder_inputs=pad(np.concatenate([[tokenizer.pad_id], targets[:-1]]), target_length),
      targets=pad(targets, target_length), weights=pad(np.ones_like(t), target_length, np.float32),
      segments=pad(np.ones_like(t), target_length), positions=pad(t, target_length),
      target_bytes=pad(tokenizer.byte_lengths[targets], target_length), domain=np.int32(domain))
