"""TFDS builders of images. TFDS wants them in a real file, and registers them by their class names."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NAMES = ["round", "square", "long"]


def picture(i: int) -> np.ndarray:
  return np.random.default_rng(i).integers(256, size=(6 + i % 3, 7, 3), dtype=np.uint8)


def as_png(pixels: np.ndarray) -> bytes:
  """TFDS would want TensorFlow for it."""
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, "PNG")
  return out.getvalue()


class _Pictures(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  image: tfds.features.Image

  def _info(self):
    features = dict(image=self.image, label=tfds.features.ClassLabel(names=NAMES),
                    id=tfds.features.Scalar(np.int64))
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 12), "test": self._generate_examples(12, 15)}

  def _generate_examples(self, first, last):
    for i in range(first, last):
      yield i, dict(image=self.file(i), label=NAMES[i % 3], id=i)

  def file(self, i: int) -> bytes:
    return as_png(picture(i))


class TinyPictures(_Pictures):
  """Twelve pictures of three classes for training and three for testing, of three sizes."""

  image = tfds.features.Image()


class ClearPictures(_Pictures):
  """The same with an alpha channel, 255 for every second pixel of a row and else 0; one is cut off."""

  image = tfds.features.Image(shape=(None, None, 4))

  def file(self, i):
    alpha = np.full((*picture(i).shape[:2], 1), [[0], [255], [0], [255], [0], [255], [0]], np.uint8)
    whole = as_png(np.concatenate([picture(i), alpha], axis=-1))
    return whole[:len(whole) // 2] if i == 5 else whole
