"""Records of images with their texts: an endless shuffled stream for training, whole sets for validation."""

from collections.abc import Sequence

import grain
import numpy as np
from PIL import Image

from sparse_experts.config import seeds
from sparse_experts.data.images.augment import augment, fit
from sparse_experts.data.images.datasets import Decoded, ImageDataset
from sparse_experts.data.sources import Source
from sparse_experts.data.text.datasets import VALID_SEED
from sparse_experts.data.text.tokenizers import Tokenizer
from sparse_experts.errors import UserError


def make_dataset(config, split: str, tokenizer: Tokenizer, source: Source) -> ImageDataset:
  """Record i: `images` [size, size, 3] in -1 to 1, `texts` [length] ids, `text_mask` [length], `weights` 1.

  `train`: a new permutation of all pairs in each epoch; the order and what is done to an image come from
  `config.seed.data` and the record's number alone. `valid`: a fixed order drawn once for all runs, as many as
  fill whole sets of `eval.batch_size`, which is what a pair is told from: what is left over is left out.
  """
  pairs, options = getattr(source, split), config.data.image
  picture = Decoded(pairs)
  id_NL, mask_NL = _encode([pair["text"] for pair in pairs], tokenizer, config.data, split)

  def record(w: int, image: Image.Image) -> dict[str, np.ndarray]:
    return _record(image, id_NL[w], mask_NL[w])

  if split == "valid":
    sets = len(pairs) // config.eval.batch_size
    if not sets:
      raise UserError(f"data.source='{config.data.source}' has {len(pairs)} validation pairs, fewer than the "
                      f"eval.batch_size={config.eval.batch_size} that are told apart; lower that, or raise "
                      "data.valid_share")
    order = np.random.default_rng(VALID_SEED).permutation(len(pairs))[:sets * config.eval.batch_size]
    return ImageDataset(lambda i: record(order[i], fit(picture[order[i]], options.size)), len(order),
                        len(order))
  seed = seeds(config)["data"]

  def train_record(i: int, w: int) -> dict[str, np.ndarray]:
    return record(w, augment(picture[w], options, np.random.default_rng([seed, i])))

  endless = grain.MapDataset.range(len(pairs)).seed(seed).shuffle().repeat().map_with_index(train_record)
  return ImageDataset(endless.__getitem__, len(endless), len(pairs))


def example(config_data) -> dict[str, np.ndarray]:
  """A black image and a text of padding, as a training record of `config.data`."""
  size, length = config_data.image.size, config_data.length
  return _record(Image.new("RGB", (size, size)), np.zeros(length, np.int32), np.zeros(length, bool))


def _encode(texts: Sequence[bytes], tokenizer: Tokenizer, config_data, split: str):
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


def _record(image: Image.Image, id_L: np.ndarray, mask_L: np.ndarray) -> dict[str, np.ndarray]:
  return dict(images=np.asarray(image, np.float32) / np.float32(127.5) - 1, texts=id_L, text_mask=mask_L,
              weights=np.float32(1))
