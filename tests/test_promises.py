"""Every promise of the page names tests that are there."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def functions(path):
  tree = ast.parse((ROOT / path).read_text())
  return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_promise_names_tests_that_are_there():
  rows = [line for line in (ROOT / "docs/promises.md").read_text().splitlines() if line.startswith("| ")]
  promises = [row for row in rows if row != "| promise | held by |"]
  assert len(promises) > 10
  for row in promises:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
    assert named, f"no test holds {row}"
    for path, name in named:
      assert name in functions(path), f"{path} has no {name}"
