"""Keys by their dotted names: `model.router.k`."""

from collections.abc import Iterator

from ml_collections import ConfigDict


def paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
  """Dotted names of all keys that hold a value."""
  for name in config:
    if isinstance(config[name], ConfigDict):
      yield from paths(config[name], f"{prefix}{name}.")
    else:
      yield prefix + name
