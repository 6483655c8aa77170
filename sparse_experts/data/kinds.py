"""Text, images or pairs of both: `config.data.objective` says which, and what differs is chosen here."""

import types
from types import ModuleType

import numpy as np

from sparse_experts.config import row_tokens
from sparse_experts.data import sources
from sparse_experts.data.images import datasets as image_datasets
from sparse_experts.data.images import sources as images
from sparse_experts.data.images.classes import Classes
from sparse_experts.data.pairs import datasets as pair_datasets
from sparse_experts.data.pairs import sources as pairs
from sparse_experts.data.sources import Source
from sparse_experts.data.text import datasets
from sparse_experts.data.text.datasets import Dataset
from sparse_experts.data.text.tokenizers import Tokenizer, make_tokenizer


def has_images(config_data) -> bool:
  """Whether images of classes are what a run is about."""
  return config_data.objective in images.OBJECTIVES


def has_pairs(config_data) -> bool:
  return config_data.objective in pairs.OBJECTIVES


def _sources(config_data) -> ModuleType:
  return images if has_images(config_data) else pairs if has_pairs(config_data) else sources


def _datasets(config_data) -> ModuleType:
  return image_datasets if has_images(config_data) else pair_datasets if has_pairs(config_data) else datasets


def open_source(config_data) -> Source:
  """The documents, images or pairs that `config_data.source` names, in two parts."""
  return _sources(config_data).open_source(config_data)


def as_source(data, config_data, **keys) -> Source:
  """Documents, images or pairs of one's own: a sequence, or an object with `.train` and `.valid`."""
  return _sources(config_data).as_source(data, config_data, **keys)


def hold_out(source: Source, config_data) -> Source:
  """A part of the source's training documents or images in place of what it holds out, to choose by."""
  of = _sources(config_data)
  train, valid = of.split(source.train, config_data.valid_share, config_data.source)
  return of.as_source(types.SimpleNamespace(train=train, valid=valid, domains=source.domains), config_data)


def make_vocabulary(config_data, source: Source | None = None) -> Tokenizer | Classes:
  """What the rows of the model's head stand for; the source is opened if it is needed and not given.

  Without it, classes whose number is set have numbers for names.
  """
  if has_images(config_data) and source is None and config_data.image.classes:
    return Classes([str(c) for c in range(config_data.image.classes)])
  if has_images(config_data):
    return Classes((source or open_source(config_data)).domains, config_data.image.classes)
  if source is None and config_data.tokenizer.partition(":")[0] in ("sentencepiece", "words"):
    source = open_source(config_data)
  texts = None if source is None else (d["text"] for d in source.train)
  return make_tokenizer(config_data.tokenizer, texts)


def read_vocabulary(saved: bytes) -> Tokenizer | Classes:
  """What its `serialize` wrote."""
  return Classes.read(saved) or make_tokenizer(saved)


def make_dataset(config, split: str, vocabulary: Tokenizer | Classes, source: Source) -> Dataset:
  """The records of `source.train` or `source.valid` for `config.data.objective`."""
  return _datasets(config.data).make_dataset(config, split, vocabulary, source)


def example(config, vocabulary: Tokenizer | Classes) -> dict[str, np.ndarray]:
  """A made-up record, nothing being read: names, shapes and types are those of all training records."""
  if has_images(config.data):
    return image_datasets.example(config.data.image)
  if has_pairs(config.data):
    return pair_datasets.example(config.data)
  return datasets.example(config.data, vocabulary)


def row_lengths(config, vocabulary: Tokenizer | Classes) -> dict[str, int]:
  """Tokens that an encoder (0: none) and a decoder see of a row: `encoder`, `targets`."""
  if has_images(config.data) or has_pairs(config.data):
    return dict(encoder=row_tokens(config), targets=0)
  return datasets.lengths(config.data, vocabulary)
