"""The folder of a run: which config owns it, what may change when it is resumed, and its files.

config.json, tokenizer.model, metrics.jsonl, checkpoints/, tensorboard/.
"""

import collections
import json
import os

from sparse_experts import storage
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
    os.makedirs(workdir, exist_ok=True)
  except OSError as e:
    raise UserError(f"workdir {workdir} cannot be made ({e.strerror}); choose another folder") from None
  if not os.access(workdir, os.W_OK | os.X_OK):
    raise UserError(f"workdir {workdir} cannot be written; choose another folder or mend its permissions")
  changed = {}
  if is_claimed(workdir):
    changed = differences(read_config(workdir), config)
    _refuse(workdir, changed, config)
  elif os.path.isdir(checkpoints(workdir)) and any(n.isdecimal() for n in os.listdir(checkpoints(workdir))):
    raise UserError(f"workdir {workdir} has checkpoints but no config.json; "
                    "restore it, or choose another folder")
  return changed


def is_claimed(workdir: str) -> bool:
  """Whether the folder holds a run, begun or finished."""
  return os.path.exists(os.path.join(workdir, "config.json"))


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
