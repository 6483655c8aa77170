"""The folder of a run: which config owns it, what may change when it is resumed, and its files.

config.json, run.json, tokenizer.model, metrics.jsonl, checkpoints/, tensorboard/; lease.json while a training
has it.
"""

import contextlib
import functools
import operator
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from sparse_experts import processes, storage
from sparse_experts.config import ConfigDict, check_workdir, differences, from_json, read_config, to_json
from sparse_experts.config.schema import MAY_CHANGE_ON_RESUME
from sparse_experts.data import Vocabulary
from sparse_experts.errors import UserError
from sparse_experts.results import parse_row, read_lines
from sparse_experts.small_files import Damaged, read_bytes, reason, set_aside
from sparse_experts.tasks import task_of
from sparse_experts.training.optimizer import STEPS_BOUND


def checkpoints(workdir: str) -> str:
  return os.path.join(workdir, "checkpoints")


def metrics(workdir: str) -> str:
  return os.path.join(workdir, "metrics.jsonl")


def tokenizer(workdir: str) -> str:
  return os.path.join(workdir, "tokenizer.model")


def claim(workdir: str, config: ConfigDict, saved: Callable[[], ConfigDict | None] = lambda: None,
          ) -> dict[str, list]:
  """Whether `config` may train here: {changed key: [value then, value now]} of a run that is resumed.

  saved: the config of the newest checkpoint, which stands for a config.json that is damaged. Refuses a file,
  a folder that cannot be written and one that holds another config. Writes nothing yet: a mistake found later
  must not make the folder the wrong config's.
  """
  check_workdir(workdir)
  storage.prepare(workdir, f"workdir {workdir}")
  changed = {}
  if is_claimed(workdir):
    try:
      kept = read_config(workdir)
    except Damaged:
      if (copy := saved()) is None:
        raise
      kept = copy
    changed = differences(kept, config)
    _refuse(workdir, changed, config)
  elif storage.is_folder(checkpoints(workdir)) and any(
      name.isdecimal() for name in storage.names(checkpoints(workdir))):
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
    seen = storage.exists(path)
    processes.compare("the workdir", lambda: {
        "the workdir": "shared" if seen else f"not that of process 0, but {storage.absolute(workdir)}"})
  finally:
    if processes.is_first():
      storage.remove(path)


def facts(tokenizer: Vocabulary) -> dict[str, Any]:
  """What has to be the same of a tokenizer in all processes."""
  return {"the vocabulary": f"{tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]}"}


def is_claimed(workdir: str) -> bool:
  """Whether the folder holds a run, begun or finished."""
  return storage.exists(os.path.join(workdir, "config.json"))


def is_finished(workdir: str) -> bool:
  """Whether the last row of metrics.jsonl holds the final figure."""
  try:
    return any("measure" in (parse_row(line) or {}) for line in read_lines(metrics(workdir))[-1:])
  except Damaged:  # the log keeps it aside
    return False


def keep(workdir: str, config: ConfigDict, vocabulary: Vocabulary, run_file: str = "") -> list[str]:
  """Makes the folder this config's; returns a message for each damaged file, which is kept aside.

  run_file: the contents of run.json.
  """
  its_own = {tokenizer(workdir): vocabulary.serialize()}
  if run_file:
    its_own[os.path.join(workdir, "run.json")] = run_file.encode()
  with writing(workdir):
    found = [_put(path, its, functools.partial(operator.eq, its)) for path, its in its_own.items()]
    path = os.path.join(workdir, "config.json")
    found.append(_put(path, to_json(config).encode(), lambda there: bool(from_json(there.decode(), path))))
  return [message for message in found if message]


def _put(path: str, content: bytes, right: Callable[[bytes], bool]) -> str:
  """Writes a file; what has its name and is not `right` is kept aside, which the message says."""
  why = ""
  try:
    if not right(read_bytes(path, "")):
      why = f"{path} is not that of this run"
  except FileNotFoundError:
    pass
  except UnicodeDecodeError:
    why = f"{path} is not UTF-8"
  except Damaged as e:
    why = str(e).partition(";")[0]
  aside = f"{why}; kept aside as {set_aside(path)} and written anew" if why else ""
  storage.write(path, content)
  return aside


@contextlib.contextmanager
def writing(workdir: str) -> Iterator[None]:
  """A disk that cannot take what is written in the block is a UserError."""
  try:
    yield
  except OSError as e:
    where = e.filename or workdir
    raise UserError(f"{where} cannot be written ({reason(e)}); make room or mend the disk, and run the same "
                    "command again") from None


def fixed(changed: dict[str, list]) -> dict[str, list]:
  """Those of the changed keys that a resume may not change."""
  return {k: v for k, v in changed.items() if k not in MAY_CHANGE_ON_RESUME and not _moved(k, *v)}


def shown(changed: dict[str, list]) -> str:
  words = ", ".join(f"{k}={old!r} there and {new!r} here" for k, (old, new) in list(changed.items())[:4])
  return words + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")


def them(changed: dict[str, list]) -> str:
  return "it" if len(changed) == 1 else "them"


def _refuse(workdir: str, changed: dict[str, list], config: ConfigDict) -> None:
  if differ := fixed(changed):
    raise UserError(f"workdir {workdir} holds another config: {shown(differ)}; choose another workdir, or "
                    f"set {them(differ)} back")
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
  path, way_out = tokenizer(workdir), "restore it, or run the same `train` command again, which makes it anew"
  try:
    content = read_bytes(path, way_out)
  except FileNotFoundError:
    return None
  try:
    return task_of(config).read_vocabulary(content)
  except (ValueError, KeyError, TypeError, RecursionError, MemoryError) as e:  # UserErrors too
    raise Damaged(f"{path} is not the tokenizer or the classes of a run ({reason(e)}); {way_out}") from None
