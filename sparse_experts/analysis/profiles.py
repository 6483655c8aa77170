"""Sorts assignments by what is known of their tokens, and says how far that tells the expert.

A profile is a way to sort: by domain, by position in the row, by class of the token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_experts.analysis import specialisation, token_text
from sparse_experts.analysis.trace import Columns
from sparse_experts.models import Batch
from sparse_experts.tasks import Task


class Profile(NamedTuple):
  """Names of the categories, and the one of each assignment."""

  names: list[str]
  category_N: np.ndarray


def profiles(layer: str, traced: Columns, batch: Batch, task: Task, vocabulary: Any,
             domains: Sequence[str]) -> dict[str, Profile]:
  """By domain, class or modality, by position and, of text, by class of the token.

  traced: `trace`'s columns of the layer, on `batch`.
  """
  found = {task.grouping: Profile(list(domains), traced["domain"])}
  length = task.routed(layer, batch).id_BL.shape[1]
  found["position"] = _named(task.places(layer, length), traced["position"])
  if task.token_targets:
    ids, which_N = np.unique(traced["token_id"], return_inverse=True)
    found["token class"] = _named([token_text.token_class(vocabulary, int(i)) for i in ids], which_N)
  return found


def assignments(traced: Columns) -> Columns:
  """Without the choices that a router skipped."""
  return {column: a[traced["valid"]] for column, a in traced.items()}


def specialisations(layer: str, trained: Columns, untrained: Columns, num_experts: int, batch: Batch,
                    task: Task, vocabulary: Any, domains: Sequence[str]) -> dict[str, dict[str, Any]]:
  """{profile: {"trained", "untrained", "hash": `specialisation.specialisation`}} of a layer.

  trained, untrained: `trace`'s columns of the layer, of a run and of `untrained(run, ...)`, on `batch`. hash:
  of the trained run's tokens if their ids alone chose (`hashed`); left out where tokens are no text.
  """
  arms = {"trained": assignments(trained), "untrained": assignments(untrained)}
  if len(trained["token_id"]) and (trained["token_id"] >= 0).all():
    arms["hash"] = hashed(arms["trained"], num_experts)
  found: dict[str, dict[str, Any]] = {}
  for arm, columns in arms.items():
    for name, (names, category_N) in profiles(layer, columns, batch, task, vocabulary, domains).items():
      found.setdefault(name, {})[arm] = specialisation.specialisation(
          category_N, len(names), columns["expert"], num_experts, columns["example"])
  return found


def hashed(traced: Columns, num_experts: int, seed: int = 0) -> Columns:
  """The same assignments by a hash router (Roller et al. 2021): a random expert for each id.

  Choice number r of a token is the r-th expert after its first one, so a token's experts differ.
  """
  ids, which_N = np.unique(traced["token_id"], return_inverse=True)
  first_I = np.random.default_rng(seed).integers(num_experts, size=len(ids))
  return traced | {"expert": ((first_I[which_N] + traced["rank"]) % num_experts).astype(np.int32)}


def _named(name_I: list[str], which_N: np.ndarray) -> Profile:
  """Categories by the names of what is numbered; equal names are one category."""
  names = list(dict.fromkeys(name_I))
  return Profile(names, np.array([names.index(name) for name in name_I], np.int64)[which_N])
