"""Takes the optimizer's state of the run whose weights a run starts from: `config.init_optimizer`.

`fresh`: nothing; the run counts its steps from 0. `step`: it continues the other run's count, and with it
learning rates and data; moments start at zero, as in the code that upcycled T5 (t5x/contrib/moe). `moments`:
also the moments of every array that is taken, an expert's as copies of the dense FFN's. Komatsuzaki et al.
2022 describe this for upcycled vision models; we have not seen it in code.

Moments that start at zero count their own steps: Adam's correction and Adafactor's decay are those of a first
step. With `moments`, Adafactor counts per matrix, but AdamW has one count for all, and a fresh router's first
updates under it are (1 - b1) / sqrt(1 - b2) times the rate.
"""

from typing import Any

from sparse_experts.config import ConfigDict, read_config
from sparse_experts.errors import UserError
from sparse_experts.models import names
from sparse_experts.training.optimizer import split_path

Path = tuple[str, ...]
PART = "opt_state"


def sources(config: ConfigDict, folder: str, step: int, there: dict[str, Any], here: dict[str, Any],
            of_params: dict[Path, list[names.Place | None]]) -> dict[Path, list[names.Place | None]]:
  """The sources of each array of the optimizer's state here, as in `Given.sources`.

  of_params: the same of parameters; the rows of their moments follow them.
  """
  mode, what = config.init_optimizer, f"init_optimizer={config.init_optimizer}"
  if mode == "fresh":
    return {}
  if step >= config.train.steps:
    raise UserError(f"{what} continues from step {step} of {folder}, and train.steps={config.train.steps} "
                    f"ends there; set train.steps above {step}, or init_optimizer=fresh")
  theirs, ours = _arrays(there), _arrays(here)
  if ("", "rate") not in theirs:
    raise UserError(f"{what}: step {step} of {folder} holds no optimizer's state, as of converted weights; "
                    "set init_optimizer=fresh")
  taken: dict[Path, list[names.Place | None]] = {ours["", "rate"]: [names.Place(theirs["", "rate"])]}
  if mode == "step":
    return taken
  names_of = [c.optimizer.name for c in (read_config(folder), config)]
  if names_of[0] != names_of[1]:
    raise UserError(f"{what}: optimizer.name={names_of[0]} in {folder} and {names_of[1]} here, whose moments "
                    f"differ; set optimizer.name={names_of[0]}, or init_optimizer=step")
  for (param, kind), path in ours.items():
    if not param:
      taken[path] = [names.Place(theirs[param, kind])]
      continue
    rows = of_params.get(("params", *param.split("/")), [])
    own = ["/".join(place.path[1:]) if place else "" for place in rows]
    if lacking := [name for name in own if name and (name, kind) not in theirs]:
      raise UserError(f"{what}: {folder} has no moments of {lacking[0]}, which train.only left out there; "
                      "set init_optimizer=step, or the same train.only")
    taken[path] = [names.Place(theirs[name, kind], place.repeat) if place else None
                   for place, name in zip(rows, own, strict=True)]
  return {path: rows for path, rows in taken.items() if any(rows)}


def _arrays(tree: dict[str, Any]) -> dict[tuple[str, str], Path]:
  """{(parameter, moment): path} of a state's optimizer: ("decoder/norm/gain", "mu"), the path from PART on.

  Counts that belong to no parameter: ("", "count") of Adam's moments, ("", "rate") of the schedule.
  """
  params, paths = names.by_path(tree["params"]), list(names.by_path({PART: tree.get(PART, {})}))
  moments = {path[:path.index("mu")] for path in paths if "mu" in path}
  by_name = {}
  for path in paths:
    param, rest = split_path(path[1:], params)
    kind = "/".join(word for word in rest if not word.isdecimal())  # without indices of optax's chains
    if not param:
      kind = "count" if path[:-1] in moments else "rate"
    by_name["/".join(param), kind] = path
  return by_name
