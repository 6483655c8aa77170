"""Several sources of text in one stream, each at its rate."""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparse_experts.config import mixture, seeds
from sparse_experts.data.dataset import VALID_SEED, Dataset, Record
from sparse_experts.data.sources import Source, fingerprint
from sparse_experts.errors import UserError


def open_source(config_data: Any, open_one: Callable[[Any], Source]) -> Source:
  """All documents of `config_data.source`'s components; a domain is called "component/domain".

  open_one: opens the source of a `config.data`.
  """
  parts: dict[str, list[dict]] = {"train": [], "valid": []}
  domains: list[str] = []
  for name, (_, its) in mixture.parse(config_data.source).items():
    data = copy.deepcopy(config_data).unlock()
    data.source = its
    source = open_one(data)
    for split, documents in parts.items():
      documents += [dict(d, domain=len(domains) + d["domain"]) for d in source.part(split)]
    domains += [f"{name}/{domain}" for domain in source.domains]
  content = lambda d: f"{domains[d['domain']]} {len(d['text'])} ".encode() + d["text"]
  of_all = fingerprint("mixture", parts.values(), content)
  return Source(parts["train"], parts["valid"], tuple(domains), of_all)


def components(names: Sequence[str], source: Source) -> dict[str, Source] | None:
  """{component: its documents}, if the source is one that `open_source` made of these; else None."""
  of_domain = [domain.partition("/")[0] for domain in source.domains]
  if not set(of_domain) <= set(names):
    return None
  only = lambda part, name: [d for d in part if of_domain[d["domain"]] == name]
  return {name: Source(only(source.train, name), only(source.valid, name), source.domains, source.fingerprint)
          for name in names}


class Schedule:
  """Which component record i is of, and the how-manieth of it.

  Every block of records holds each component as often as its rate says, in an order drawn from `seed` and the
  block's number: so record i is a fact, which is found without the records before it.
  """

  def __init__(self, rates: Sequence[float], seed: int):
    parts = [round(rate * mixture.PARTS) for rate in rates]
    self._seed, self.counts = seed, [n // math.gcd(*parts) for n in parts]
    self.block = sum(self.counts)
    self._order = functools.lru_cache(maxsize=64)(self._draw)

  def _draw(self, block: int) -> np.ndarray:
    every = np.repeat(np.arange(len(self.counts)), self.counts)
    return np.random.default_rng([self._seed, block]).permutation(every)

  def __call__(self, i: int) -> tuple[int, int]:
    block, place = divmod(i, self.block)
    order = self._order(block)
    c = int(order[place])
    return c, block * self.counts[c] + int((order[:place] == c).sum())

  def most(self, lengths: Sequence[int]) -> int:
    """Records until a component of these lengths is used up."""
    i = min(length // count for length, count in zip(lengths, self.counts, strict=True)) * self.block
    while (of := self(i))[1] < lengths[of[0]]:
      i += 1
    return i


def mix(config: Any, split: str, parts: Sequence[Dataset], rates: Sequence[float]) -> Dataset:
  """Records of the parts at these rates, with `component`, the number of the part they are of.

  train: endless. valid: until the records of a part are used up, in an order that is the same for all runs.
  """
  schedule = Schedule(rates, seeds(config)["data"] if split == "train" else VALID_SEED)

  def get(i: int) -> Record:
    c, n = schedule(i)
    return parts[c][n] | {"component": np.int32(c)}

  def documents(i: int) -> np.ndarray:
    c, n = schedule(i)
    return parts[c].documents(n) * len(parts) + c  # no number is in two parts

  if split == "train":
    return Dataset(get, min(map(len, parts)), sum(part.num_windows for part in parts))
  number = schedule.most([len(part) for part in parts])
  if not number:
    raise UserError(f"data.source='{config.data.source}' has no validation record of the component that is "
                    "drawn first; give it more documents")
  return Dataset(get, number, number, documents)
