"""Makes the peers' virtual environments: one per library, kept in the user's cache."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping

from sparse_experts import storage
from sparse_experts.benchmark.peers import processes
from sparse_experts.errors import UserError

MINUTES = 30  # for one call of venv or pip


@dataclasses.dataclass(frozen=True)
class Environment:
  """What pip installs; `python`: its version, None: the one that runs us."""

  requirements: tuple[str, ...]
  python: str | None = None


# MaxText's wheel requires nothing by itself (its extra for TPUs does not exist, that for GPUs is 200 packages
# with CUDA), so the second line is what its layer and its config import.
ENVIRONMENTS = {
    "transformers": Environment(("transformers==5.24.0", "torch==2.13.0", "numpy")),
    "maxtext": Environment((
        "maxtext==0.2.5", "jax==0.12.0.1", "flax==0.12.12", "libtpu==0.0.52",
        "absl-py", "aqtp", "chex", "drjax", "grain", "huggingface_hub", "Jinja2", "ml-collections", "numpy",
        "omegaconf", "optax", "orbax-checkpoint", "pathwaysutils", "pillow", "pydantic", "qwix==0.1.8",
        "tokamax==0.0.17", "transformers"), "3.12"),
}


def python_of(name: str, say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> str:
  """The Python of an environment, which is made first if it is not there; "ours" is the running one.

  Raises UserError if that Python is missing, or if pip fails or takes too long.
  """
  if name == "ours":
    return sys.executable
  needs = ENVIRONMENTS[name]
  base = find_python(needs.python, environ)
  text = "\n".join([os.path.realpath(base), *needs.requirements])
  key = hashlib.sha256(text.encode()).hexdigest()[:12]
  folder = os.path.join(storage.user_cache("peers", environ), f"{name}-{key}")
  inside, complete = os.path.join(folder, "bin", "python"), os.path.join(folder, "complete")
  if not os.path.exists(complete):
    say(f"{name}: installing {', '.join(needs.requirements[:2])} and what they need in {folder}; this can "
        "take minutes")
    processes.run([base, "-m", "venv", "--clear", folder], 60 * MINUTES, environ)
    processes.run([inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                   *needs.requirements], 60 * MINUTES, environ)
    storage.write(complete, text)
  return inside


def find_python(version: str | None, environ: Mapping[str, str] = os.environ) -> str:
  """A Python of that version: on the PATH, or one of pyenv's. Raises UserError if there is none."""
  if version is None or sys.version_info[:2] == tuple(map(int, version.split("."))):
    return sys.executable
  name = f"python{version}"
  found = [path for folder in environ.get("PATH", "").split(os.pathsep)
           if (path := shutil.which(name, path=folder))]
  pyenv = pathlib.Path(environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv")
  found += map(str, sorted(pyenv.glob(f"versions/{version}*/bin/{name}")))
  for path in found:
    try:
      processes.run([path, "-c", "import venv"], 60 * MINUTES, environ)  # a shim of pyenv's may lead nowhere
    except UserError:
      continue
    return path
  raise UserError(f"it needs Python {version} and there is no {name} on the PATH")
