"""The folder of a run: which config owns it, what may change when it is resumed, and its files.

config.json, tokenizer.model, metrics.jsonl, checkpoints/, tensorboard/; lease.json while a training has it.
"""

import collections
import hashlib
import json
import os
import uuid
from typing import Any

from sparse_experts import processes, storage
from sparse_experts.config import ConfigDict, check_workdir, differences, read_config, to_json
from sparse_experts.config.schema import MAY_CHANGE_ON_RESUME
from sparse_experts.data import Vocabulary
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of
from sparse_experts.training.optimizer import STEPS_BOUND


def checkpoints(workdir: str) -> str:
  return os.path.join(workdir, "checkpoints")


def metrics(workdir: str) -> str:
  return os.path.join(workdir, "metrics.jsonl")


def claim(workdir: str, config: ConfigDict) -> dict[str, list]:
  """Whether `config` may train here: {changed key: [value then, value now]} of a run that is resumed.

  Refuses a file, a folder that cannot be written and one that holds another config. Writes nothing yet:
  a mistake found later must not make the folder the wrong config's.
  """
  check_workdir(workdir)
  if os.path.exists(workdir) and not os.path.isdir(workdir):
    raise UserError(f"workdir {workdir} is a file; name a folder")
  try:
    storage.make_folders(workdir)
  except OSError as e:
    raise UserError(f"workdir {workdir} cannot be made ({e.strerror}); choose another folder") from None
  if not os.access(workdir, os.W_OK | os.X_OK):
    raise UserError(f"workdir {workdir} cannot be written; choose another folder or mend its permissions")
  changed = {}
  if os.path.exists(os.path.join(workdir, "config.json")):
    changed = differences(read_config(workdir), config)
    _refuse(workdir, changed, config)
  elif os.path.isdir(checkpoints(workdir)) and any(n.isdecimal() for n in os.listdir(checkpoints(workdir))):
    raise UserError(f"workdir {workdir} has checkpoints but no config.json; "
                    "restore it, or choose another folder")
  return changed


def check_shared(workdir: str) -> None:
  """Refuses a folder that not all processes see: process 0 would write to one that others never read."""
  if processes.are_alone():
    return
  path = os.path.join(workdir, processes.of_first(f".{uuid.uuid4().hex}.tmp"))
  if processes.is_first():
    storage.write(path, "")
  try:
    processes.compare("whether the workdir is shared", dict)
    seen = os.path.exists(path)
    processes.compare("the workdir", lambda: {
        "the workdir": "shared" if seen else f"not that of process 0, but {os.path.abspath(workdir)}"})
  finally:
    if processes.is_first():
      os.remove(path)


def facts(tokenizer: Vocabulary) -> dict[str, Any]:
  """What has to be the same of a tokenizer in all processes."""
  digest = hashlib.sha256(tokenizer.serialize()).hexdigest()[:12]
  return {"the vocabulary": f"{tokenizer.vocab_size} ids, {digest}"}


def is_finished(workdir: str) -> bool:
  """Whether the last row of metrics.jsonl holds the final figure."""
  try:
    with open(metrics(workdir), encoding="utf-8") as f:
      return "measure" in json.loads("".join(collections.deque(f, maxlen=1)))
  except (FileNotFoundError, ValueError):  # no row yet, or one cut off by a kill
    return False


def keep(workdir: str, config: ConfigDict, tokenizer: Vocabulary) -> None:
  """Makes the folder this config's."""
  storage.write(os.path.join(workdir, "tokenizer.model"), tokenizer.serialize())
  storage.write(os.path.join(workdir, "config.json"), to_json(config))


def _refuse(workdir: str, changed: dict[str, list], config: ConfigDict) -> None:
  fixed = {k: v for k, v in changed.items() if k not in MAY_CHANGE_ON_RESUME and not _moved(k, *v)}
  if fixed:
    shown = ", ".join(f"{k}={old!r} there and {new!r} here" for k, (old, new) in list(fixed.items())[:4])
    more = f" and {len(fixed) - 4} more" if len(fixed) > 4 else ""
    raise UserError(f"workdir {workdir} holds another config: {shown}{more}; choose another workdir, or set "
                    f"{'it' if len(fixed) == 1 else 'them'} back")
  if "train.steps" in changed and config.optimizer.schedule in STEPS_BOUND:
    old, new = changed["train.steps"]
    raise UserError(f"workdir {workdir}: train.steps={old} there and {new} here, but the learning rates of "
                    f"optimizer.schedule='{config.optimizer.schedule}' depend on it; choose another workdir, "
                    "or set it back")


def _moved(key: str, old: object, new: object) -> bool:
  """The same files in another place; that they are the same is seen by their fingerprint."""
  return key == "data.source" and str(old).startswith("files:") and str(new).startswith("files:")


def read_tokenizer(workdir: str, config: ConfigDict) -> Vocabulary | None:
  """The tokenizer of the run of that config, or its classes; None before it has one."""
  path = os.path.join(workdir, "tokenizer.model")
  if not os.path.exists(path):
    return None
  with open(path, "rb") as f:
    return task_of(config).read_vocabulary(f.read())
