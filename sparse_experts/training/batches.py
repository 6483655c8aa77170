"""Batches for `Run.model`: made of texts of one's own, and checked before the model is compiled for them."""

import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_experts.config import ConfigDict
from sparse_experts.data import Record
from sparse_experts.errors import UserError
from sparse_experts.models import Batch
from sparse_experts.tasks import task_of


def of_texts(config: ConfigDict, tokenizer: Any, texts: Sequence[str | bytes]) -> Batch:
  """A row of `data.length` tokens for each text, in order; refuses one that is too long."""
  task = task_of(config)
  if not task.token_targets:
    raise UserError(f"batch makes rows of texts, and this run is on {task.items}; stack records of "
                    "run.dataset(), as analysis.probe.probe(run, 8) does")
  if isinstance(texts, str | bytes):
    texts = [texts]
  rows = []
  for i, text in enumerate(texts):
    source = task.as_source(types.SimpleNamespace(train=[text], valid=[text]), name=f"text {i}")
    dataset = task.make_dataset("valid", tokenizer, source)
    if len(dataset) > 1:
      raise UserError(f"text {i} has {len(dataset)} rows of data.length={config.data.length} tokens; cut it "
                      "into parts")
    rows.append(dataset[0])
  if not rows:
    raise UserError("batch was given no text; give it one or more")
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def check(fields: Sequence[str], example: Record, batch: Any) -> None:
  """Refuses a batch that lacks what the model reads, or has it in another number of dimensions."""
  way_out = "run.batch(texts) and analysis.probe.probe(run, 8) make whole ones"
  if not isinstance(batch, Mapping):
    raise UserError(f"a batch is a dict of arrays {', '.join(fields)}, not {type(batch).__name__}; {way_out}")
  if missing := [name for name in fields if name not in batch]:
    raise UserError(f"the batch lacks {', '.join(missing)}; the model reads {', '.join(fields)}: {way_out}")
  number = np.shape(batch[fields[0]])[:1]
  for name in fields:
    shape, row = np.shape(batch[name]), np.shape(example[name])
    fixed = name == "images"  # rows of text may be of any length
    if len(shape) != 1 + len(row) or (fixed and shape[1:] != row) or shape[:1] != number:
      wanted = ", ".join(map(str, row if fixed else ["length"] * len(row)))
      raise UserError(f"the batch's {name} has shape {shape}, wanted are [rows{', ' * bool(row)}{wanted}], "
                      f"with as many rows as {fields[0]}; {way_out}")
