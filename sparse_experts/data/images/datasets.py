"""Records of images: augmented in an endless shuffled stream for training, as they are in a frozen list."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sparse_experts.config import seeds
from sparse_experts.data.dataset import Dataset, Record, make_records
from sparse_experts.data.images.augment import augment, fit
from sparse_experts.data.images.classes import Classes
from sparse_experts.data.images.files import decode
from sparse_experts.data.sources import Source

KEPT = 2**28  # bytes of pixels that stay decoded


class Decoded:
  """The images by number, decoded; what comes first stays in memory, up to `KEPT` bytes of pixels.

  Decoding a JPEG of 32 x 32 takes as long as changing it. They are shared: nobody may write into one.
  """

  def __init__(self, images: Sequence[dict]):
    self._images, self._room = images, KEPT
    self._kept: dict[int, Image.Image] = {}

  def __getitem__(self, i: int) -> Image.Image:
    image = self._kept.get(i)
    if image is None:
      image = decode(self._images[i]["image"])
      size = 3 * image.width * image.height
      if size <= self._room:
        self._room -= size
        self._kept[i] = image
    return image


def make_dataset(config, split: str, classes: Classes, source: Source) -> Dataset:
  """The records of `source.train` or `source.valid`; labels are numbered as in `classes`.

  Record i: `images` [size, size, 3] in -1 to 1, `targets` [M] classes, `shares` [M] of them, `weights` 1; M
  is 2 with mixup, else 1. What is done to a training image and what it is blended with follow from
  `config.seed.data` and the record's number alone; validation images are resized and cropped in the middle.
  """
  images, options = source.part(split), config.data.image
  number, seed = classes.numbers(source.domains), seeds(config)["data"]
  label_I, picture = [number[image["label"]] for image in images], Decoded(images)

  def record(i: int, w: int) -> Record:
    if split == "valid":
      return _record([(fit(picture[w], options.size), label_I[w], 1.0)])
    rng, chosen = np.random.default_rng([seed, i]), [(w, 1.0)]
    if options.mixup:
      share = rng.beta(options.mixup, options.mixup)
      chosen = [(w, share), (int(rng.integers(len(images))), 1 - share)]
    return _record([(augment(picture[j], options, rng), label_I[j], part) for j, part in chosen])

  return make_records(config, split, len(images), record)


def in_order(images: Sequence[dict], size: int) -> Dataset:
  """Each image once, in order, resized and cropped in the middle."""
  picture = Decoded(images)
  get = lambda i: _record([(fit(picture[i], size), images[i]["label"], 1.0)])
  return Dataset(get, len(images), len(images))


def example(config, classes: Classes) -> Record:
  """A black image as a training record."""
  options = config.data.image
  black = Image.new("RGB", (options.size, options.size))
  return _record([(black, 0, 0.5), (black, 0, 0.5)] if options.mixup else [(black, 0, 1.0)])


def _record(parts: Sequence[tuple[Image.Image, int, float]]) -> Record:
  """Of (image, label, share) whose shares are 1 in sum."""
  pixels = sum(np.float32(share) * np.asarray(image, np.float32) for image, _, share in parts)
  return dict(images=pixels / np.float32(127.5) - 1,
              targets=np.array([label for _, label, _ in parts], np.int32),
              shares=np.array([share for *_, share in parts], np.float32), weights=np.float32(1))
