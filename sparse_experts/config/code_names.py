"""Code that a config names, `package.module:name`: a saved config's is loaded if the user repeats the name.

A name that the user writes, on the command line or in a config that `train` gets, may be loaded. A
config.json may be a stranger's: whoever loads or evaluates a run must not run what is named there unasked.
"""

from ml_collections import ConfigDict

from sparse_experts.config import mixture
from sparse_experts.config.dotted import get, paths
from sparse_experts.errors import UserError

_saved: dict[str, tuple[str, str, str]] = {}  # name -> (file, key, value) where it was read
_trusted: set[str] = set()


def trust(name: str) -> None:
  """Lets the code of this name be loaded although a saved config names it: `trust("my_module:MyRouter")`.

  Of a mixture of sources, that of all its names.
  """
  _trusted.update([name, *mixture.sources(name)])


def trust_all(config: ConfigDict) -> None:
  """The same for all that a user's config names."""
  for _, value in _values(config):
    trust(value)


def note_saved(config: ConfigDict, path: str) -> None:
  """Remembers what the saved config in the file `path` names."""
  for key, value in _values(config):
    for name in (value, *mixture.sources(value)):
      _saved.setdefault(name, (path, key, value))


def check(name: str) -> None:
  """Raises UserError for a name that only a saved config has given; for those who are about to import it.

  What was imported once may be again.
  """
  if name in _saved and name not in _trusted:
    path, key, value = _saved[name]
    value = f"'{value}'" if " " in value else value  # as a shell takes it
    raise UserError(f"{path} names code outside the package, {key}='{name}', which runs when it is loaded; "
                    f"if you trust it, repeat it: --config.{key}={value}, in Python "
                    f"sparse_experts.config.trust('{name}')")
  trust(name)


def _values(config: ConfigDict) -> list[tuple[str, str]]:
  """(key, value) of all texts that have the form of such names; others that have it are never imported."""
  found = ((key, get(config, key)) for key in paths(config))
  return [(key, value) for key, value in found if isinstance(value, str) and ":" in value]
