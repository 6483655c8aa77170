"""A TFDS builder of our own. TFDS wants it in a real file, and registers it by its class name."""

import numpy as np
import tensorflow_datasets as tfds


class TinyCorpus(tfds.core.GeneratorBasedBuilder):
  """Forty sentences with a topic."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = dict(text=tfds.features.Text(), topic=tfds.features.ClassLabel(names=["trees", "ships"]))
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 30), "validation": self._generate_examples(30, 40)}

  def _generate_examples(self, first, last):
    for i in range(first, last):
      yield i, dict(text=f"Sentence {i} é.", topic=("trees", "ships")[i % 2])


class TinyNumbers(tfds.core.GeneratorBasedBuilder):
  """Nothing to read here."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(dict(number=tfds.features.Scalar(np.int32))))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(3):
      yield i, dict(number=i)
