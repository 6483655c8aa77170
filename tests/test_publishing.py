"""What the public host reads: citation, workflow, issue templates and the address."""

import pathlib
import re

import pytest
import setuptools
import yaml

from sparse_experts.version import VERSION

ROOT = pathlib.Path(__file__).parent.parent


def read(path):
  return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_citation():
  citation = read("CITATION.cff")
  assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format demands
  assert citation["authors"] == [{"name": "The sparse_experts developers"}]
  assert (str(citation["version"]), citation["license"]) == (VERSION, "Apache-2.0")


def test_the_workflow_runs_what_a_change_must_pass():
  workflow = read(".github/workflows/ci.yml")
  (job,) = workflow["jobs"].values()
  assert job["strategy"]["matrix"] == {"python": ["3.11", "3.12"]}
  assert job["steps"][-1] == {"run": "bash .ci/run"} and (ROOT / ".ci/run").is_file()


def test_issue_templates_ask_for_what_helps():
  forms = {path.stem: read(path) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
  assert forms.keys() == {"bug", "method"}
  for form in forms.values():
    assert {"name", "description", "body"} <= form.keys()
    assert all(part["type"] == "markdown" or part["attributes"]["label"] for part in form["body"])
  bug = (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
  assert "sparse_experts --version`" in bug and "sparse_experts report --workdir=DIR`" in bug


@pytest.mark.parametrize("address", ["", "https://example.org/sparse_experts"])
def test_the_public_address_is_given_if_there_is_one(monkeypatch, address):
  given = {}
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
  text, lines = re.subn(r"(?m)^URL = .*$", f"URL = {address!r}", (ROOT / "setup.py").read_text())
  exec(text, {})
  assert lines == 1 and given["version"] == VERSION and given.get("url", "") == address
