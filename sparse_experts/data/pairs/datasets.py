"""Records of images with their texts: an endless shuffled stream for training, whole sets for validation."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sparse_experts.config import seeds
from sparse_experts.data.dataset import Dataset, Record, make_records
from sparse_experts.data.images.augment import augment, fit
from sparse_experts.data.images.datasets import Decoded
from sparse_experts.data.sources import Source
from sparse_experts.data.text.tokenizer import Tokenizer
from sparse_experts.errors import UserError


def make_dataset(config, split: str, tokenizer: Tokenizer, source: Source) -> Dataset:
  """Record i: `images` [size, size, 3] in -1 to 1, `texts` [length] ids, `text_mask` [length], `weights` 1.

  What is done to a training image follows from `config.seed.data` and the record's number alone. A validation
  list fills whole sets of `eval.batch_size`, within which pairs are compared; what is left over is dropped.
  """
  pairs, options, rows = source.part(split), config.data.image, config.eval.batch_size
  seed, picture = seeds(config)["data"], Decoded(pairs)
  id_NL, mask_NL = _encode([pair["text"] for pair in pairs], tokenizer, config.data, split)

  def record(i: int, w: int) -> Record:
    image = (augment(picture[w], options, np.random.default_rng([seed, i])) if split == "train"
             else fit(picture[w], options.size))
    return _record(image, id_NL[w], mask_NL[w])

  if split == "valid" and len(pairs) < rows:
    raise UserError(f"data.source='{config.data.source}' has {len(pairs)} validation pairs, fewer than the "
                    f"eval.batch_size={rows} that are told apart; lower that, or raise data.valid_share")
  return make_records(config, split, len(pairs), record, length=len(pairs) // rows * rows)


def example(config, tokenizer: Tokenizer) -> Record:
  """A black image and a text of padding, as a training record."""
  size, length = config.data.image.size, config.data.length
  return _record(Image.new("RGB", (size, size)), np.zeros(length, np.int32), np.zeros(length, bool))


def _encode(texts: Sequence[bytes], tokenizer: Tokenizer, config_data, split: str,
            ) -> tuple[np.ndarray, np.ndarray]:
  """(id_NL, mask_NL) of all texts, padded to `data.length`; one that is longer is refused."""
  ids, end_N = tokenizer.encode_documents(texts)
  tokens_N, L = np.diff(end_N, prepend=0), config_data.length
  if tokens_N.max() > L:
    i = int(tokens_N.argmax())
    shown = texts[i].decode("utf-8", errors="replace")
    raise UserError(f"data.source='{config_data.source}': {split} text {i} has {tokens_N[i]} tokens, "
                    f"'{shown[:40]}', more than data.length={L}; choose {tokens_N[i]} or more, or shorten it")
  mask_NL = np.arange(L)[None] < tokens_N[:, None]
  id_NL = np.zeros(mask_NL.shape, np.int32)
  id_NL[mask_NL] = ids  # row by row, in order
  return id_NL, mask_NL


def _record(image: Image.Image, id_L: np.ndarray, mask_L: np.ndarray) -> Record:
  return dict(images=np.asarray(image, np.float32) / np.float32(127.5) - 1, texts=id_L, text_mask=mask_L,
              weights=np.float32(1))
