"""What a claim measures when it is not a run's primary figure, and the outside data that it needs."""

import ast
import hashlib
import importlib
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

from sparse_experts.errors import UserError
from sparse_experts.ledger.claim_file import Claim


def function(claim: Claim) -> Callable[..., Any]:
  """The function at the claim's `measure`, package.module:function, of the repository's experiments."""
  where = claim.fixed["measure"]
  module, _, name = where.partition(":")
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(f"{claim.path}: measure='{where}' cannot be imported ({error}); run from the root of the "
                    "repository, and give package.module:function") from None


def code(claim: Claim) -> str:
  """A hash of the package's sources that training runs, and of the file that measures with all it imports."""
  from sparse_experts.sweeps.cache import package_version

  total = hashlib.sha256(package_version().encode())
  if "measure" in claim.fixed:
    for path in sorted(_sources(claim.fixed["measure"].partition(":")[0], {})):
      total.update(pathlib.Path(path).read_bytes())
  return total.hexdigest()[:16]


def _sources(module: str, seen: dict[str, None]) -> dict[str, None]:
  """Files of a module and of those it imports, directly or not, from its own top-level package."""
  try:
    spec = importlib.util.find_spec(module)
  except ModuleNotFoundError:  # `module` is a name in a module
    return seen
  if spec is None or spec.origin is None or spec.origin in seen:
    return seen
  seen[spec.origin] = None
  top = module.partition(".")[0]
  for node in ast.walk(ast.parse(pathlib.Path(spec.origin).read_bytes())):
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom) and node.module:
      names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
      if name.partition(".")[0] == top:
        _sources(name, seen)
  return seen


def outside(claim: Claim, folder: str | None) -> tuple[str, str]:
  """(path, sha256) of the outside file that a claim names, checked; ("", "") of a claim that names none."""
  named = claim.fixed.get("data")
  if named is None:
    if folder is not None:
      raise UserError(f"--data={folder}: claim {claim.name} uses no outside data; leave it out")
    return "", ""
  what = (f"{named['file']} of {named['repository']} at commit {named['commit']} "
          f"(sha256 {named['sha256'][:16]}...)")
  if folder is None:
    raise UserError(f"claim {claim.name} needs {what}; download it and give its folder as --data=DIR")
  path = os.path.join(folder, os.path.basename(named["file"]))
  if not os.path.isfile(path):
    raise UserError(f"--data={folder} holds no {os.path.basename(path)}; claim {claim.name} needs {what}")
  digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
  if digest != named["sha256"]:
    raise UserError(f"{path} has sha256 {digest[:16]}..., but claim {claim.name} needs {what}")
  return path, digest
