"""Layout and habits: what stands where, who imports whom, and commands that stay true."""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from sparse_experts.cli import VERBS
from sparse_experts.config import LAYERS, ROUTERS
from sparse_experts.tasks import TASKS

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "sparse_experts"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in FILES}

# Who may import what of the package, from the bottom up: a room imports those before it, except where noted.
FLOORS = {
    "terminal": set(),
    "interrupts": set(),
    "full_disk": set(),
    "errors": {"terminal", "interrupts", "full_disk"},
    "environment": {"errors", "storage"},
    "host_memory": set(),
    "storage": {"errors", "full_disk"},
    "small_files": {"errors", "storage"},
    "version": set(),
    "peers": {"errors", "terminal"},
    "processes": {"errors", "terminal", "peers"},
    "config": {"errors", "small_files", "storage"},
    "partitioning": {"errors", "config"},
    "moe": {"errors", "config", "partitioning"},
    "models": {"errors", "config", "partitioning", "moe"},
    "data": {"errors", "config", "host_memory", "storage", "moe"},
    "tasks": {"errors", "config", "moe", "models", "data"},
    "validation": {"errors", "config", "tasks"},
    "results": {"errors", "small_files", "storage", "config", "tasks"},
    "profiling": {"errors", "storage"},
    "training": {"errors", "full_disk", "terminal", "interrupts", "host_memory", "small_files", "storage",
                 "peers", "processes", "config", "validation", "results", "partitioning", "moe", "models",
                 "data", "tasks", "profiling", "version"},
    "analysis": {"errors", "small_files", "storage", "config", "validation", "results", "partitioning", "moe",
                 "models", "data", "tasks", "training"},
    "report": {"errors", "small_files", "storage", "version", "config", "results", "moe", "models", "data",
               "tasks", "training", "analysis"},
    "aot": {"errors", "config", "validation", "partitioning", "models", "data", "tasks", "profiling",
            "training"},
    "sweeps": {"errors", "small_files", "storage", "version", "config", "results", "partitioning", "data",
               "tasks", "training"},
    "ledger": {"errors", "small_files", "storage", "version", "config", "analysis", "sweeps"},
    "benchmark": {"errors", "storage", "config", "validation", "results", "partitioning", "moe", "models",
                  "data", "training"},
    "convert": {"errors", "full_disk", "small_files", "storage", "config", "validation", "partitioning",
                "moe", "models", "data", "tasks", "training"},
    "cli": {"errors", "terminal", "version", "processes", "environment", "host_memory", "storage", "config",
            "validation", "results", "partitioning", "moe", "models", "data", "tasks", "training", "analysis",
            "report", "aot", "sweeps", "ledger", "benchmark", "convert"},
    "__main__": {"cli", "processes", "terminal", "interrupts"},
    "__init__": {"config", "training", "moe", "version"},
}
LIGHT = {"moe", "models"}  # these import nothing heavier than:
LIGHT_IMPORTS = {"jax", "flax", "chex", "numpy", "ml_collections"}
COLLECTIVES = {"psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "all_to_all", "ppermute",
               "pshuffle", "ragged_all_to_all", "shard_map"}
# What imports by name -> which modules of the package these may be; a user's modules are not among them.
IMPORTS_BY_NAME = {
    "sparse_experts.cli": {f"sparse_experts.cli.{verb}" for verb in VERBS},
    "sparse_experts.data.sources": set(),
    "sparse_experts.ledger.measures": set(),
    "sparse_experts.moe.registry": {
        f"sparse_experts.moe.{room}.{where.partition(':')[0]}"
        for room, table in (("routers", ROUTERS), ("mixtures", LAYERS)) for where in table.values()},
    "sparse_experts.tasks": {f"sparse_experts.tasks.{where.partition(':')[0]}" for where in TASKS.values()},
}
# import name -> distribution, where they differ
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "tensorflow_datasets": "tensorflow-datasets", "PIL": "Pillow",
                 "sklearn": "scikit-learn"}


@functools.cache
def tree(path):
  return ast.parse(path.read_text())


def floor(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
  """Full names of the modules a file imports, wherever in the file."""
  for node in ast.walk(tree(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      full = (f"{node.module}.{alias.name}" for alias in node.names)
      yield from {name if name in MODULES else node.module for name in full}


def names(path):
  """Every identifier used in a file's code: names, attributes and what is imported."""
  for node in ast.walk(tree(path)):
    if isinstance(node, ast.Name):
      yield node.id
    elif isinstance(node, ast.Attribute):
      yield node.attr
    elif isinstance(node, ast.ImportFrom):
      yield from (alias.name for alias in node.names)


def third_party(path):
  tops = {name.split(".")[0] for name in imports(path)}
  return tops - set(sys.stdlib_module_names) - {"sparse_experts"}


def test_imports_go_down():
  for path in FILES:
    for name in imports(path):
      if name.startswith("sparse_experts."):
        target, own = name.split(".")[1], floor(path)
        assert target == own or target in FLOORS[own], f"{path}: {own} may not import {name}"


def circle(graph):
  """The modules of one circle of imports, [] if there is none."""
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return error.args[1]
  return []


def test_no_import_circles_visible_or_through_importlib():
  """Between files, imports in functions too; that a module's package is loaded first does not count."""
  by_name = {name for name, path in MODULES.items() if "import_module" in names(path)}
  assert by_name == IMPORTS_BY_NAME.keys()
  graph = {name: {*imports(path)} & MODULES.keys() | IMPORTS_BY_NAME.get(name, set())
           for name, path in MODULES.items()}
  assert not circle(graph)


# Files that open, rename or replace by themselves: what is in them is none to be found after a power cut.
WRITES_ITSELF = {
    "storage/local.py",
    "storage/objects.py",  # files on their way to a store
    "storage/logs.py",  # appends lines
    "storage/lease.py",
    "terminal.py",  # /dev/null
    "full_disk.py",  # takes the room of an array that is mapped
}


def test_files_are_written_by_storage():
  """Which puts them on the disk: no other file opens one to write, or renames."""
  for path in [*FILES, *(ROOT / "experiments").rglob("*.py")]:
    if str(path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path) in WRITES_ITSELF:
      continue
    for node in ast.walk(tree(path)):
      if isinstance(node, ast.Call):
        name, mode = ast.unparse(node.func), "".join(map(ast.unparse, node.args[1:2]))
        assert name not in ("os.rename", "os.replace"), f"{path}:{node.lineno}: {name}; use storage.move"
        assert name != "open" or not {*"wx+"} & {*mode}, (
            f"{path}:{node.lineno}: {ast.unparse(node)}; use storage.write or storage.create")


def test_moe_and_models_import_nothing_heavy():
  for path in FILES:
    if floor(path) in LIGHT:
      assert third_party(path) <= LIGHT_IMPORTS, path


@pytest.mark.parametrize("found, home", [
    (lambda path: COLLECTIVES & set(names(path)), "moe/parallel"),
    (lambda path: {"NamedSharding"} & set(names(path)), "partitioning.py"),
    (lambda path: {"orbax"} & third_party(path), "training/checkpoints"),
    (lambda path: {"fsspec", "gcsfs", "epath"} & {*third_party(path), *names(path)}, "storage"),
    (lambda path: {"matplotlib"} & third_party(path), "report"),
    (lambda path: {"setLevel", "basicConfig", "captureWarnings"} & set(names(path)), "__main__.py"),
], ids=["collectives", "NamedSharding", "orbax", "stores", "matplotlib", "log levels"])
def test_one_place_names(found, home):
  for path in FILES:
    if not path.is_relative_to(PACKAGE / home):
      assert not found(path), f"{path} names {found(path)}, which belongs to {home}"


def test_no_tensorflow():
  for path in FILES + sorted(ROOT.glob("configs/**/*.py")):
    assert not {"tensorflow", "clu", "seqio"} & third_party(path), path


def test_moe_can_be_read_in_one_sitting():
  """What moves tokens, and what all routers share; of the rest one reads what one uses."""
  core = ("layer dispatch experts capacity routing/assignments routing/router routing/lists grouped/layout "
          "grouped/rows grouped/matmul parallel/run parallel/shard parallel/experts "
          "parallel/all_to_all")
  lines = lambda name: len((PACKAGE / "moe" / f"{name}.py").read_text().splitlines())
  assert sum(map(lines, core.split())) < 1400
  others = (path.relative_to(PACKAGE / "moe").with_suffix("") for path in (PACKAGE / "moe").rglob("*.py"))
  assert all(lines(name) <= 160 for name in others if str(name) not in [*core.split(), "check"])


def test_layers_are_measured_with_what_they_need():
  """jax, flax and numpy: a GPU machine may have nothing else."""
  code = ("import sys; import sparse_experts.cli.benchmark, sparse_experts.benchmark.layer; "
          "print(*{name.split('.')[0] for name in sys.modules})")
  run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  names = {distribution: name for name, distribution in DISTRIBUTIONS.items()}
  brought_by_flax = {"optax", "rich"}
  heavy = {names.get(r.name, r.name) for r in requirements()[0]} - LIGHT_IMPORTS - brought_by_flax
  assert len(heavy) > 5 and not heavy & set(run.stdout.split())


def test_config_files_are_pure():
  for path in ROOT.glob("configs/**/*.py"):
    assert third_party(path) <= {"ml_collections"}, path
    assert {name for name in imports(path) if name.startswith("sparse_experts")} <= {"sparse_experts.config"}


def test_command_line_starts_without_jax():
  code = ("import sys; from sparse_experts import cli; "
          "cli.main(['--help']); cli.main(['--version']); cli.main(['train']); "
          "sys.exit(bool({'jax', 'flax', 'grain', 'orbax'} & set(sys.modules)))")
  run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr


def test_tasks_are_known_without_jax():
  """A config is checked and a result read before jax is imported."""
  code = ("import sys; from sparse_experts.tasks import TASKS, check, task_of; "
          "from sparse_experts.config import default_config; c = default_config(); check(c); "
          "kinds = [task_of(c) for c.data.objective in TASKS]; assert all(kind.unit for kind in kinds); "
          "sys.exit(bool({'jax', 'flax', 'grain'} & set(sys.modules)))")
  run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr


@functools.cache
def requirements():
  """The literals REQUIRED and EXTRAS of setup.py."""
  tables = {node.targets[0].id: ast.literal_eval(node.value) for node in tree(ROOT / "setup.py").body
            if isinstance(node, ast.Assign)}
  return [Requirement(r) for r in tables["REQUIRED"]], {k: list(map(Requirement, v)) for k, v in
                                                        tables["EXTRAS"].items()}


def test_installed_versions_satisfy_setup():
  required, extras = requirements()
  for requirement in [*required, *extras["test"]]:
    assert not requirement.url
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), requirement


def test_every_import_is_declared():
  required, extras = requirements()
  for path in FILES:
    # Which say what to install.
    optional = extras[{"foreign.py": "hf", "requests.py": "gcs"}[path.name]] if path.name in (
        "foreign.py", "requests.py") else []
    declared = {requirement.name.lower() for requirement in [*required, *optional]}
    for name in third_party(path):
      assert DISTRIBUTIONS.get(name, name).lower() in declared, f"{path} imports {name}; setup.py lacks it"


def test_readme_commands():
  readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
  test = [line for line in readme.splitlines() if "-m pytest" in line]
  train = [line for line in readme.splitlines() if "pip install" in line and " train " in line]
  assert len(test) == 1
  assert "pip install" in test[0]
  assert "'-m pytest' README.md" in ci.replace("-e ", "")  # .ci/run takes its command from there
  assert len(train) == 1
  assert "--config=configs/smoke.py" in train[0]


def test_the_readme_is_short_and_counts_right():
  readme = (ROOT / "README.md").read_text()
  assert len(readme.splitlines()) <= 160
  assert f"| {len(ROUTERS)} routers and {len(LAYERS)} layers" in readme


def test_docs_list_every_recipe():
  listed = set(re.findall(r"`(configs/[\w/]+\.py)`", (ROOT / "docs/reproduce.md").read_text()))
  assert listed == {str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.py")}


def test_docs_list_every_folder():
  listed = set(re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs/code.md").read_text(), re.MULTILINE))
  assert listed >= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_license_is_whole():
  text = (ROOT / "LICENSE").read_text()
  assert "Version 2.0, January 2004" in text
  assert "END OF TERMS AND CONDITIONS" in text
  assert len(text.split()) > 1500
