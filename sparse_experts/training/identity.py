"""Whether a checkpoint is the run's own: of its id, its config and its tokenizer.

A checkpoint holds all three with a checksum (its step and the names, shapes and types of its arrays too: see
`checkpoints/steps.py`); run.json in the folder of a run holds its id. What an older version did not write is
not checked.
"""

import contextlib
import json
import os
import uuid
import zlib
from collections.abc import Callable
from typing import Any

from sparse_experts.config import KEYS, ConfigDict, differences, from_json, to_json
from sparse_experts.data import Source, Vocabulary
from sparse_experts.errors import UserError
from sparse_experts.small_files import Damaged, read_json
from sparse_experts.tasks import task_of
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints.steps import Steps


def describe(config: ConfigDict, tokenizer: Vocabulary, data_fingerprint: str, run: str) -> dict[str, str]:
  """What a checkpoint says of its run; `run` is the run's id."""
  return {"config": to_json(config), "data_fingerprint": data_fingerprint,
          "tokenizer": tokenizer.fingerprint, "run": run}


def new_id() -> str:
  return uuid.uuid4().hex


def id_file(run: str) -> str:
  """The contents of run.json."""
  return json.dumps({"id": run, "check": zlib.crc32(run.encode())}) + "\n"


def read_id(workdir: str) -> str | None:
  """The id of the run in a folder; None where an older version wrote none, or it is damaged."""
  try:
    kept = read_json(os.path.join(workdir, "run.json"), "remove it")
  except (FileNotFoundError, Damaged):
    return None
  run = kept.get("id")
  right = isinstance(run, str) and run.isascii() and id_file(run) == json.dumps(kept) + "\n"
  return run if right else None


def newest(steps: Steps) -> tuple[dict[str, Any], str] | None:
  """(`meta`, path) of the newest step whose meta is not damaged; None without one."""
  for step in reversed(steps.steps()):
    with contextlib.suppress(Damaged):
      return steps.meta(step), steps.path(step)
  return None


def saved_config(workdir: str) -> ConfigDict | None:
  """The config of the newest checkpoint of a run."""
  found = newest(Steps(wd.checkpoints(workdir)))
  return config_of(*found) if found else None


def vocabulary(workdir: str, config: ConfigDict, source: Source, say: Callable[[str], None]) -> Vocabulary:
  """The tokenizer of a run that starts or is resumed: that of its checkpoints, or a new one.

  tokenizer.model is believed where a checkpoint was trained with it; else it is made of the source again.
  """
  found = newest(Steps(wd.checkpoints(workdir)))
  if found is None:
    return task_of(config).make_vocabulary(source)
  meta, path = found
  kept = None
  try:
    kept = wd.read_tokenizer(workdir, config)
  except Damaged as e:
    say(f"{e.args[0].partition(';')[0]}; made anew")
  if kept is not None and meta.get("tokenizer", kept.fingerprint) == kept.fingerprint:
    return kept
  made = task_of(config).make_vocabulary(source)
  if meta.get("tokenizer", made.fingerprint) != made.fingerprint:
    raise UserError(f"{wd.tokenizer(workdir)} is not the tokenizer that checkpoint {path} was trained with, "
                    f"and data.tokenizer={config.data.tokenizer} does not make it again; restore the file")
  return made


def config_of(meta: dict[str, Any], path: str) -> ConfigDict | None:
  """The config that a checkpoint holds; None of an older version's."""
  try:
    return from_json(meta["config"], f"the config in checkpoint {path}") if "config" in meta else None
  except Damaged as e:  # by its checksum it is not: another version wrote it
    raise UserError(str(e)) from None


def check(steps: Steps, step: int, workdir: str, config: ConfigDict,
          tokenizer: Vocabulary | None) -> dict[str, Any]:
  """`meta` of a step; refuses another run's, naming what differs.

  config, tokenizer: of the folder. What a resume may change may differ.
  """
  meta, path = steps.meta(step), steps.path(step)
  run = read_id(workdir)
  if run is not None and meta.get("run", run) != run:
    raise UserError(f"checkpoint {path} is of another run ({meta['run'][:8]} there, {run[:8]} in run.json of "
                    f"{workdir}); remove it, or bring back the run's own")
  if (then := config_of(meta, path)) is not None:
    written = json.loads(meta["config"])
    changed = {key: values for key, values in differences(then, config).items()
               if key not in KEYS or _has(written, key)}  # others came with a later version
    if fixed := wd.fixed(changed):
      raise UserError(f"checkpoint {path} was trained with another config: {wd.shown(fixed)}; set "
                      f"{wd.them(fixed)} back, in {workdir}/config.json too, or name another workdir")
  if tokenizer is not None and meta.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
    raise UserError(f"{wd.tokenizer(workdir)} is not the tokenizer that checkpoint {path} was trained with; "
                    "restore it, or run the same `train` command again, which makes it anew")
  return meta


def _has(tree: Any, key: str) -> bool:
  for part in key.split("."):
    if not isinstance(tree, dict) or part not in tree:
      return False
    tree = tree[part]
  return True
