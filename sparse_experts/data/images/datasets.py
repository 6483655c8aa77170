"""Records of images: augmented in an endless shuffled stream for training, as they are in a frozen list."""

from collections.abc import Sequence

import grain
import numpy as np
from PIL import Image

from sparse_experts.config import seeds
from sparse_experts.data.images.augment import augment, fit
from sparse_experts.data.images.classes import Classes
from sparse_experts.data.images.files import decode
from sparse_experts.data.sources import Source
from sparse_experts.data.text.datasets import VALID_SEED, Dataset

KEPT = 2**28  # bytes of pixels that stay decoded


class Decoded:
  """The images by number, decoded; what comes first stays in memory, up to `KEPT` bytes of pixels.

  Decoding a JPEG of 32 x 32 takes as long as changing it. They are shared: nobody may write into one.
  """

  def __init__(self, images: Sequence[dict]):
    self._images, self._kept, self._room = images, {}, KEPT

  def __getitem__(self, i: int) -> Image.Image:
    found = self._kept.get(i)
    if found is None:
      found = decode(self._images[i]["image"])
      size = 3 * found.width * found.height
      if size <= self._room:
        self._room -= size
        self._kept[i] = found
    return found


class ImageDataset(Dataset):
  """Record i: `images` [size, size, 3] in -1 to 1, `targets` [M] classes, `shares` [M] of them, `weights` 1.

  M is 2 with mixup, else 1.
  """

  def records_for_bytes(self, min_bytes: int) -> int:
    """All: an image has no bytes of target."""
    del min_bytes
    return self.num_windows


def make_dataset(config, split: str, classes: Classes, source: Source) -> ImageDataset:
  """The records of `source.train` or `source.valid`; labels are numbered as in `classes`.

  `train`: a new permutation of all images in each epoch; the order, what is done to an image and what it is
  blended with come from `config.seed.data` and the record's number alone. `valid`: each image once, in a
  fixed order drawn once for all runs, resized and cropped in the middle.
  """
  images, options = getattr(source, split), config.data.image
  number = classes.numbers(source.domains)

  images = [image | {"label": number[image["label"]]} for image in images]
  if split == "valid":
    order = np.random.default_rng(VALID_SEED).permutation(len(images))
    return as_they_are([images[i] for i in order], options.size)
  seed, picture = seeds(config)["data"], Decoded(images)

  def train_record(i: int, w: int) -> dict[str, np.ndarray]:
    rng, chosen = np.random.default_rng([seed, i]), [(w, 1.0)]
    if options.mixup:
      share = rng.beta(options.mixup, options.mixup)
      chosen = [(w, share), (rng.integers(len(images)), 1 - share)]
    return _record([(augment(picture[j], options, rng), images[j]["label"], part) for j, part in chosen])

  endless = grain.MapDataset.range(len(images)).seed(seed).shuffle().repeat().map_with_index(train_record)
  return ImageDataset(endless.__getitem__, len(endless), len(images))


def as_they_are(images: Sequence[dict], size: int) -> ImageDataset:
  """Each image once, in order, resized and cropped in the middle."""
  picture = Decoded(images)
  get = lambda i: _record([(fit(picture[i], size), images[i]["label"], 1.0)])
  return ImageDataset(get, len(images), len(images))


def example(options) -> dict[str, np.ndarray]:
  """A black image as a training record of `config.data.image`."""
  black = Image.new("RGB", (options.size, options.size))
  return _record([(black, 0, 0.5), (black, 0, 0.5)] if options.mixup else [(black, 0, 1.0)])


def _record(parts: Sequence[tuple[Image.Image, int, float]]) -> dict[str, np.ndarray]:
  """Of (image, label, share) whose shares are 1 in sum."""
  pixels = sum(np.float32(share) * np.asarray(image, np.float32) for image, _, share in parts)
  return dict(images=pixels / np.float32(127.5) - 1,
              targets=np.array([label for _, label, _ in parts], np.int32),
              shares=np.array([share for *_, share in parts], np.float32), weights=np.float32(1))
