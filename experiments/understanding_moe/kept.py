"""results.json: what a command was asked for and every run that is done, so that a killed command goes on."""

import dataclasses
import json
import os
from typing import Any

from sparse_experts import storage
from sparse_experts.errors import UserError


@dataclasses.dataclass(frozen=True)
class Job:
  setting: int
  model: str
  seed: int


class Kept:
  """The runs of one folder; `asked` (number of examples and the like) must be the same for all of them."""

  def __init__(self, folder: str, asked: dict[str, Any]):
    self.path, self.asked, self.runs = os.path.join(folder, "results.json"), asked, {}
    try:
      os.makedirs(folder, exist_ok=True)
    except OSError as e:
      raise UserError(f"--out={folder} cannot be made ({e.strerror}); choose another folder") from None
    try:
      with open(self.path, encoding="utf-8") as f:
        content = json.load(f)
    except FileNotFoundError:
      self.write()
      return
    except ValueError:
      raise UserError(f"{self.path} is no JSON; remove it, and its runs are made again") from None
    except OSError as e:
      raise UserError(f"{self.path} cannot be read ({e.strerror}); choose another --out") from None
    if (other := content.get("asked")) != asked:
      raise UserError(f"{self.path} holds runs of {other}, not of {asked}; choose another --out, or "
                      "remove it")
    self.runs = {Job(r["setting"], r["model"], r["seed"]): r for r in content["runs"]}

  def add(self, job: Job, figures: dict[str, Any]) -> None:
    self.runs[job] = dataclasses.asdict(job) | figures
    self.write()

  def write(self, **more: Any) -> None:
    """All or nothing: a kill while writing leaves the file as it was."""
    runs = sorted(self.runs.values(), key=lambda r: (r["setting"], r["model"], r["seed"]))
    head = json.dumps({"asked": self.asked, **more}, indent=1).removesuffix("\n}")
    lines = ",".join(f"\n  {json.dumps(r)}" for r in runs)  # one line per run
    try:
      storage.write(self.path, f'{head},\n "runs": [{lines}\n ]\n}}\n')
    except OSError as e:
      raise UserError(f"{self.path} cannot be written ({e.strerror}); choose another --out") from None
