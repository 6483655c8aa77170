"""A claim's file: what was fixed before its first run, and the results that were appended since.

    {"fixed": {...}, "results": [{...}, ...]}

`FIELDS` lists what is fixed. Each result holds a hash of all that stood before it in the file, so that a file
whose claim or older result was edited afterwards is refused.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_experts import storage
from sparse_experts.errors import UserError, nearest
from sparse_experts.ledger import verdict

SCALES = ("cpu", "gpu", "tpu")
RULES = ("paired", "published")
# Of every claim: name -> type. `RULE_FIELDS` are asked besides.
FIELDS: dict[str, tuple[type, ...]] = {
  "paper": (str,), "statement": (str,), "published": (str,), "source": (str,), "estimand": (str,),
  "metric": (str,), "rule": (str,), "decision": (str,), "prediction": (str,), "scales": (dict,),
}
RULE_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
  "paired": {"sign": (int,), "delta": (int, float), "arms": (dict,), "baseline": (str,), "tested": (str,)},
  "published": {"measure": (str,), "at_least": (int,)},
}
OPTIONAL: dict[str, tuple[type, ...]] = {
  "measure": (str,), "control": (str,), "is_control": (bool,), "data": (dict,), "not_tested": (str,)}
SCALE_FIELDS: dict[str, tuple[type, ...]] = {"minutes": (int, float), "tokens": (int,)}
PAIRED_SCALE_FIELDS: dict[str, tuple[type, ...]] = {"seeds": (list,), "pilot": (dict,), "power": (int, float)}
ROUNDED = 0.005  # a power is written with two digits
LEAST_SEEDS = {"cpu": 5, "gpu": 8, "tpu": 8}


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
  """One claim. `name` is its file's path below the ledger's folder, without .json."""

  name: str
  path: str
  fixed: Mapping[str, Any]
  results: Sequence[Mapping[str, Any]]

  @property
  def paired(self) -> bool:
    return self.fixed["rule"] == "paired"

  @property
  def trained(self) -> bool:
    """Whether its arms are configs to train; otherwise `measure` makes a figure of an arm and a seed."""
    return all("config" in arm for arm in self.fixed["arms"].values())

  def newest(self, scale: str) -> Mapping[str, Any] | None:
    """The last result at a scale."""
    return next((result for result in reversed(self.results) if result["scale"] == scale), None)

  @property
  def newest_of_each(self) -> dict[str, Mapping[str, Any]]:
    """The last result at each scale that has one, in the order of SCALES."""
    return {scale: result for scale in SCALES if (result := self.newest(scale)) is not None}


def ledger(folder: str) -> dict[str, Claim]:
  """All claims below a folder by name, each checked; files without a `fixed` are no claims."""
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise UserError(f"--ledger={folder}: no such folder; run from the root of the repository, which has "
                    "experiments/")
  claims = {}
  for path in sorted(root.glob("*/*.json")):
    try:
      content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise UserError(f"{path} cannot be read ({error}); restore it") from None
    if isinstance(content, dict) and "fixed" in content:
      name = path.relative_to(root).with_suffix("").as_posix()
      claims[name] = checked(Claim(name, str(path), content["fixed"], content.get("results", [])))
  return claims


def find(claims: Mapping[str, Claim], name: str) -> Claim:
  if name not in claims:
    raise UserError(f"there is no claim '{name}'{nearest(name, claims)}")
  return claims[name]


def chosen(claims: Mapping[str, Claim], name: str, scale: str) -> list[Claim]:
  """The claim of a name, or those that match a pattern and wait for a result at `scale`, controls first."""
  if not set(name) & set("*?["):
    return [find(claims, name)]
  matching = [claim for claim in claims.values() if fnmatch.fnmatchcase(claim.name, name)]
  if not matching:
    raise UserError(f"no claim matches '{name}'; claim list shows all")
  todo = [claim for claim in matching if scale in claim.fixed["scales"] and claim.newest(scale) is None]
  if not todo:
    raise UserError(f"of {len(matching)} claims that match '{name}' none waits for a result at "
                    f"--scale={scale}; name one to run it again")
  return sorted(todo, key=lambda claim: not claim.fixed.get("is_control", False))


def checked(claim: Claim) -> Claim:
  """The claim, unless a field is missing, unknown or of another type, or it was changed after a result."""
  fixed = claim.fixed
  if not isinstance(fixed, dict):
    raise UserError(f"{claim.path}: fixed is no object; see experiments/switch for claims")
  rule = fixed.get("rule")
  if rule not in RULES:
    raise UserError(f"{claim.path}: rule='{rule}' is unknown; known: {', '.join(RULES)}")
  _check_fields(claim.path, fixed, FIELDS | RULE_FIELDS[rule], OPTIONAL)
  for scale, plan in fixed["scales"].items():
    if scale not in SCALES:
      raise UserError(f"{claim.path}: scale '{scale}' is unknown; known: {', '.join(SCALES)}")
    asked = SCALE_FIELDS | (PAIRED_SCALE_FIELDS if claim.paired else {})
    _check_fields(f"{claim.path}, scale {scale}", plan, asked, {"overrides": (dict,)})
    if claim.paired and len(set(plan["seeds"])) < LEAST_SEEDS[scale]:
      raise UserError(f"{claim.path}: {len(set(plan['seeds']))} seeds on {scale}; at least "
                      f"{LEAST_SEEDS[scale]} different ones are fixed before a claim runs")
    if claim.paired:
      _check_pilot(claim, scale)
  if claim.paired:
    _check_pairs(claim)
  for i, result in enumerate(claim.results):
    if result.get("before") != digest(fixed, claim.results[:i]):
      raise UserError(f"{claim.path} was changed after its result {i + 1}; restore it, or make a new claim")
  return claim


def _check_pilot(claim: Claim, scale: str) -> None:
  """Refuses a pilot whose seeds are counted too, or a power that its deviation does not bear."""
  plan, delta, sign = claim.fixed["scales"][scale], claim.fixed["delta"], claim.fixed["sign"]
  if set(plan["seeds"]) & set(plan["pilot"].get("seeds", ())):
    raise UserError(f"{claim.path}: the pilot's seeds are counted too; give the pilot seeds of its own")
  if "deviation" in plan["pilot"] and delta > 0:
    n, deviation = len(plan["seeds"]), plan["pilot"]["deviation"]
    if (found := verdict.power(n, deviation, delta, sign)) < plan["power"] - ROUNDED:
      raise UserError(f"{claim.path}: power={plan['power']:g} on {scale}, but {n} seeds whose differences "
                      f"deviate by {deviation:g} have {found:.2f} at delta={delta:g}; fix "
                      f"{verdict.seeds_for(deviation, delta, sign, plan['power'])} seeds")


def check_piloted(claim: Claim, scale: str) -> None:
  """Refuses a paired claim whose power nobody looked at."""
  if claim.paired and "deviation" not in claim.fixed["scales"][scale]["pilot"]:
    raise UserError(f"{claim.path}: the pilot has no deviation; first: claim pilot {claim.name} "
                    f"--scale={scale}")


def _check_pairs(claim: Claim) -> None:
  fixed = claim.fixed
  for key in ("baseline", "tested"):
    if fixed[key] not in fixed["arms"]:
      raise UserError(f"{claim.path}: {key}='{fixed[key]}' is no arm{nearest(fixed[key], fixed['arms'])}")
  if not claim.trained and "measure" not in fixed:
    raise UserError(f"{claim.path}: an arm has no config; give each one, or a measure that makes figures of "
                    "arms")
  if fixed["sign"] not in (-1, 0, 1):
    raise UserError(f"{claim.path}: sign={fixed['sign']}; it is -1, 0 or 1, of tested minus baseline")
  if not fixed["delta"] > 0:
    raise UserError(f"{claim.path}: delta={fixed['delta']}; the smallest effect of interest is above 0")


def _check_fields(where: str, given: Mapping[str, Any], asked: Mapping[str, tuple[type, ...]],
                  optional: Mapping[str, tuple[type, ...]]) -> None:
  known = {**asked, **optional}
  for key in asked:
    if key not in given:
      raise UserError(f"{where}: '{key}' is missing; a claim fixes it before it runs")
  for key, value in given.items():
    if key not in known:
      raise UserError(f"{where}: '{key}' is unknown{nearest(key, known)}")
    if not isinstance(value, known[key]) or (isinstance(value, bool) and bool not in known[key]):
      raise UserError(f"{where}: {key}={value!r} is no {known[key][0].__name__}")


def digest(fixed: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
  """A hash of what stands in a file before a result."""
  return hashlib.sha256(json.dumps([fixed, list(results)], sort_keys=True).encode()).hexdigest()[:16]


def append(claim: Claim, result: Mapping[str, Any]) -> Claim:
  """The claim with one more result, written to its file; what the file held before stays as it is."""
  result = {**result, "before": digest(claim.fixed, claim.results)}
  claim = dataclasses.replace(claim, results=[*claim.results, result])
  storage.write_json(claim.path, {"fixed": claim.fixed, "results": claim.results})
  return claim


def check_committed(claim: Claim) -> None:
  """Refuses a claim whose `fixed` is not in the repository's last commit; outside of a repository none is."""
  folder, file = os.path.split(os.path.abspath(claim.path))
  git = lambda *what: subprocess.run(["git", "-C", folder, *what], capture_output=True, text=True)
  try:
    if git("rev-parse", "--is-inside-work-tree").returncode:
      return
  except OSError:
    return  # no git here
  found = git("show", f"HEAD:./{file}")
  if found.returncode or json.loads(found.stdout)["fixed"] != claim.fixed:
    raise UserError(f"{claim.path} is not committed as it stands; commit it first: a claim is fixed "
                    "before its result")
