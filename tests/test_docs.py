"""What the documentation makes of docstrings, links and the code's own tables."""

import ast
import importlib
import re
import shlex
import sys

import pytest

from sparse_experts.cli import flags
from sparse_experts.config import KEYS, LAYERS, ROUTERS
from tests import test_house
from tests.test_links import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def docs():
  """The modules of docs/."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "docs"))
    import docstrings
    import generate
    import papers
    yield docstrings, generate, papers
  for module in (docstrings, generate, papers):
    del sys.modules[module.__name__]


DOCSTRING = """Takes x_GTD, gives [G, *]; `Routing`s of Fedus et al. 2021.

k: experts per
  token, say 2.
weight, z_weight: a * b.

As in the sum of
losses: nothing else.

    column  meaning

- one
- two"""
RENDERED = """Takes x_GTD, gives [G, \\*]; ``Routing``\\ s of `Fedus et al. 2021 <https://arxiv.org/abs/2101.03961>`__.

``k``
    experts per token, say 2.

``weight``, ``z_weight``
    a \\* b.

As in the sum of losses: nothing else.

::

        column  meaning

- one

- two
"""


def test_a_docstring_as_restructured_text(docs):
  assert "\n".join(docs[0].render(DOCSTRING.splitlines())) == RENDERED


def test_links_lead_to_the_pages_of_files(docs):
  relink = docs[1].relink
  text = "[a](../../docs/measures.md#loss) [b](../limoe/README.md) ![c](c.png) [d](https://d.org) [e](#e)"
  page = text.replace("../../docs/", "../../").replace("../limoe/README", "limoe").replace(
      "(c.png)", "(../../../experiments/speed/c.png)")
  assert relink(text, "experiments/speed/README.md", "generated/experiments/speed.md") == page
  assert relink("[a](../CONTRIBUTING.md#a)", "docs/code.md", "code.md") == "[a](generated/contributing.md#a)"


def test_tables_leave_nothing_out(docs):
  keys, routers = docs[1].config_keys(), docs[1].routers().splitlines()[2:]
  assert len([line for line in keys.splitlines() if line.startswith("| `")]) == len(KEYS)
  assert [re.search(r"`(\w+) <", line)[1] for line in routers] == [*ROUTERS, *LAYERS]
  without = [re.search(r"`(\w+) <", line)[1] for line in routers if "https://arxiv.org/abs/" not in line]
  # Controls: `random` without THOR's consistency loss, and `frozen`, are no paper's methods.
  assert without == ["random", "frozen"], "a router's docstring names its paper"


def test_python_on_pages_needs_only_what_the_package_brings():
  brought = {requirement.name.lower() for requirement in test_house.requirements()[0]} | {"sparse_experts"}
  printed = lambda page: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
  blocks = [(page, block) for page in PAGES for block in printed(page)]
  assert len(blocks) >= 5
  for page, block in blocks:
    for node in ast.walk(ast.parse(block)):
      names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
               [node.module] if isinstance(node, ast.ImportFrom) else [])
      for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names):
        assert test_house.DISTRIBUTIONS.get(name, name).lower() in brought, f"{page.name} imports {name}"


def test_commands_on_pages_are_understood():
  """Flags and keys; the folders that they name need not be there."""
  commands = {command.strip() for page in PAGES for command in re.findall(
      r"^ *(?:.*&& )?(?:\S*/)?python -m sparse_experts ((?:.*\\\n)*.*)$", page.read_text(), re.M)}
  assert len(commands) > 20
  for command in commands:
    verb, *argv = shlex.split(command.replace("\\\n", " "), comments=True)
    args = flags.parse(verb, importlib.import_module(f"sparse_experts.cli.{verb}"), argv)
    if getattr(args, "config", None) and "/" in args.config and (ROOT / args.config.split(":")[0]).exists():
      flags.read_config(args)
