"""What the documentation makes of docstrings, links and the code's own tables."""

import re
import sys

import pytest

from sparse_experts.config import KEYS, LAYERS, ROUTERS
from tests.test_links import ROOT


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
  # `random` is a control: without THOR's consistency loss it is no paper's method.
  assert without == ["random"], "a router's docstring names its paper"
