"""The configs that come with the package: configs/ of the repository, which a wheel carries along."""

import ast
import dataclasses
import pathlib

FOLDER = "configs"


@dataclasses.dataclass(frozen=True)
class Shipped:
  """A config's name, such as switch/tiny.py, its file, the arguments of FILE:ARG, and what it is."""

  name: str
  path: str
  variants: tuple[str, ...]
  summary: str


def paths() -> dict[str, str]:
  """The file of each config by its name."""
  package = pathlib.Path(__file__).parents[1]
  inside, beside = package / FOLDER, package.parent / FOLDER
  folder = inside if inside.is_dir() else beside  # in an installed wheel; in the repository
  return {path.relative_to(folder).as_posix(): str(path) for path in sorted(folder.rglob("*.py"))}


def configs() -> list[Shipped]:
  """All of them, read but not run."""
  return [_read(name, path) for name, path in paths().items()]


def _read(name: str, path: str) -> Shipped:
  tree = ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))
  variants = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
              and ast.unparse(node.targets[0]) == "VARIANTS"]
  summary = (ast.get_docstring(tree) or "").partition("\n")[0]
  return Shipped(name, path, variants[0] if variants else (), summary)
