"""What a report shows of the model itself, measured once per checkpoint and kept in the workdir."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from sparse_experts import storage
from sparse_experts.config import check_workdir, read_config
from sparse_experts.errors import UserError
from sparse_experts.results import kept_checkpoints
from sparse_experts.small_files import read_json

FORMAT = 1  # of what is kept; a change of what is measured makes it larger


def cards(workdir: str, *, data: Any = None, router: Any = None,
          say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
  """Expert cards, regret, rerouting cost, saturation and the layer table of the newest checkpoint, as JSON.

  Read from WORKDIR/report_cache if the same checkpoints were measured before; only otherwise jax is imported.
  data, router: what was given to `train`, where that was not the config's; `report` shows what was measured
  with them. Raises UserError for a workdir without checkpoints, and where the run cannot be loaded.

    step, checkpoint   which, and a hash of what was measured
    tokens, records    of the sample, the first of the frozen validation list
    seconds            that it took
    unit, grouping     of `rerouting`'s figures; what domains are: domain, class or modality
    other_data         whether the source is not what the run was trained on
    rerouting          {loss, random, cost} on the sample; None where a layer assigns nothing
    model              {head, rows}, the layer table; params_total, params_active, flops_per_token
    layers             of each sparse layer: name, num_experts, k, saturation, regret, expert_cards and
                       information (`report/expert_cards.py`); why_missing says in words why there are none,
                       or no regret
  """
  check_workdir(workdir)
  kept = kept_checkpoints(workdir)
  if not kept:
    raise UserError(f"{os.path.join(workdir, 'checkpoints')} holds no checkpoint; train the run first, or "
                    "name another workdir")
  key = hashlib.sha256(json.dumps([FORMAT, list(kept.items())]).encode()).hexdigest()[:16]
  folder = os.path.join(workdir, "report_cache")
  path = os.path.join(folder, f"{key}.json")
  with contextlib.suppress(OSError, UserError):
    return read_json(path, "remove it")
  _check_given(workdir, data, router)
  from sparse_experts.report import measure

  found = {"checkpoint": key} | measure.measure(workdir, list(kept), data, router, say)
  with contextlib.suppress(OSError):  # of a workdir that may only be read; it is measured again next time
    storage.make_folders(folder)
    storage.write(path, json.dumps(found))
    for other in storage.names(folder):
      if other != f"{key}.json":
        storage.remove(os.path.join(folder, other))
  return found


def _check_given(workdir: str, data: Any, router: Any) -> None:
  """Refuses a run whose router or data came from Python and are not given here, with the call to copy."""
  given = read_config(workdir).given
  lacks = {"router": given.router and router is None and f"{given.router}(...)",
           "data": given.data and data is None and "..."}
  if any(lacks.values()):
    what = " and ".join(name for name in lacks if lacks[name])
    call = ", ".join([repr(workdir), *(f"{name}={lacks[name]}" for name in lacks if lacks[name])])
    raise UserError(f"run {workdir} was trained with {what} given in Python; measure its cards there, `from "
                    f"sparse_experts.report import cards; cards.cards({call})`, and run report again")
