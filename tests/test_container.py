"""The container file holds what an installation needs, and a pod's exit code tells a stop from the end."""

import re
import shlex

import pytest
import yaml

from sparse_experts import cli
from sparse_experts.errors import Stopped
from tests.test_house import requirements
from tests.test_install import ROOT, SOURCES

LINES = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().splitlines()
         if line and not line.startswith("#")]


def of(instruction):
  return [rest for name, rest in LINES if name == instruction]


def test_it_takes_what_an_installation_takes():
  """`tests/test_install.py` installs the package from these files."""
  sources = [name for copy in of("COPY") for name in copy.split()[:-1]]
  assert sources == list(SOURCES)
  ignore = (ROOT / ".dockerignore").read_text().split()
  assert ignore == ["*", *(f"!{name}" for name in SOURCES), "**/__pycache__"]


def test_its_python_is_one_that_is_tested_and_its_extras_exist():
  (base,) = of("FROM")
  workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
  (job,) = workflow["jobs"].values()
  assert re.fullmatch(r"python:(\d\.\d+)-slim", base)[1] in job["strategy"]["matrix"]["python"]
  (command,) = of("RUN")
  extras = re.search(r"-e \.\[(.*)\]$", " ".join(shlex.split(command)))[1].split(",")
  assert extras == ["tpu", "gcs"] and set(extras) <= requirements()[1].keys()


@pytest.mark.parametrize("argv, code", [((), 0), (("--stopped_code=143",), 143)])
def test_a_stopped_training_ends_with_the_code_that_is_asked_for(monkeypatch, argv, code):
  """By default 0, which a job of Kubernetes takes for finished."""

  def train(*_, **__):
    raise Stopped("SIGTERM")

  monkeypatch.setattr("sparse_experts.training.loop.train", train)
  assert cli.main(["train", "--config=configs/smoke.py", "--workdir=runs/none", *argv]) == code
