"""What the command line understands."""

import importlib
import json
import platform
import re
import shlex
from importlib import metadata

import pytest

from sparse_experts import cli
from sparse_experts.cli import flags, overrides, sweep
from sparse_experts.config import default_config, load_config
from sparse_experts.version import VERSION


def overridden(*argv):
  config = default_config()
  pairs, rest = overrides.split(argv)
  assert rest == []
  for key, text in pairs:
    overrides.override(config, key, text)
  return config


@pytest.mark.parametrize("argv, key, value", [
    (["--config.train.steps=7"], "train.steps", 7),
    (["--config.train.steps", "7"], "train.steps", 7),
    (["--config.eval.min_bytes=2_000"], "eval.min_bytes", 2000),
    (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
    (["--config.optimizer.learning_rate", "-1e-3"], "optimizer.learning_rate", -1e-3),
    (["--config.mesh.fsdp"], "mesh.fsdp", True),
    (["--config.mesh.fsdp=false"], "mesh.fsdp", False),
    (["--config.mesh.fsdp", "--config.train.steps=7"], "mesh.fsdp", True),
    (["--config.model.moe_layers=1,3"], "model.moe_layers", (1, 3)),
    (["--config.model.moe_layers=(1,3)"], "model.moe_layers", (1, 3)),
    (["--config.model.moe_layers=2"], "model.moe_layers", (2,)),
    (["--config.model.moe_layers=(2,)"], "model.moe_layers", (2,)),
    (["--config.model.moe_layers=()"], "model.moe_layers", ()),
    (["--config.model.decoder.moe_layers=0,1"], "model.decoder.moe_layers", (0, 1)),
    (["--config.data.mean_span=3"], "data.mean_span", 3.0),
    (["--config.data.mean_span=3", "--config.data.mean_span=none"], "data.mean_span", None),
    (["--config.data.source=files:a=b c"], "data.source", "files:a=b c"),
    (["--config.train.steps=1", "--config.train.steps=2"], "train.steps", 2),
    (["--config.model.router.temperature=0.5"], "model.router.temperature", 0.5),  # of some other router
    (["--config.model.router.temperature=1", "--config.model.router.temperature=2"],
     "model.router.temperature", 2),
    (["--config.model.router.by=task"], "model.router.by", "task"),
    (["--config.model.router.per_layer=false"], "model.router.per_layer", False),
])
def test_override(argv, key, value):
  node = overridden(*argv)
  for part in key.split("."):
    node = node[part]
  assert node == value
  assert type(node) is type(value)


def test_a_config_file_with_an_argument():
  assert load_config("configs/smoke.py").model.num_experts == 8
  assert load_config("configs/smoke.py:dense").model.num_experts == 0


def test_shipped_configs_are_found_anywhere_and_a_path_wins(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for spec in ("smoke.py", "configs/smoke.py"):
    assert load_config(spec).model.num_experts == 8 and load_config(f"{spec}:dense").model.num_experts == 0
  assert load_config("switch/tiny.py").model.name == "seq2seq"
  (tmp_path / "smoke.py").write_text(
      "from sparse_experts.config import default_config\n"
      "def get_config():\n  c = default_config()\n  c.model.num_experts = 4\n  return c\n")
  assert load_config("smoke.py").model.num_experts == 4
  assert load_config("configs/smoke.py").model.num_experts == 8
  assert cli.main(["describe", "--configs", "--json"]) == 0
  *lines, last = capsys.readouterr().out.splitlines()
  assert {row["name"]: row["variants"] for row in json.loads(last)}["smoke.py"] == ["dense"]
  assert any(line.startswith("switch/tiny.py  ") for line in lines)


def test_a_path_with_a_colon(tmp_path):
  path = tmp_path / "a:b.py"
  path.write_text("from sparse_experts.config import default_config\nget_config = default_config\n")
  assert load_config(str(path)).is_locked


def test_a_config_file_leaves_nothing_behind(tmp_path, monkeypatch):
  """Two files of one name are two configs."""
  for name, k in (("a", 1), ("b", 2)):
    (tmp_path / name).mkdir()
    (tmp_path / name / "c.py").write_text(
        "from sparse_experts.config import default_config\n"
        f"def get_config():\n  c = default_config()\n  c.model.router.k = {k}\n  return c\n")
  assert [load_config(str(tmp_path / name / "c.py")).model.router.k for name in "ab"] == [1, 2]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_verbs(argv, capsys):
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  for verb in cli.VERBS:
    assert f"\n  {verb} " in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb(verb, capsys):
  assert cli.main([verb, "--help"]) == 0
  out = capsys.readouterr().out
  assert out.startswith(f"usage: python -m sparse_experts {verb} ")
  assert ("--config.KEY=VALUE" in out) == (verb not in ("sample", "compare", "report", "claim"))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_example_of_a_verb_is_understood(verb, capsys):
  """Its config or sweep is there too."""
  cli.main([verb, "--help"])
  (example,) = re.findall(r"^Example: python -m sparse_experts (.*)$", capsys.readouterr().out, re.MULTILINE)
  name, *argv = shlex.split(example)
  assert name == verb
  args = flags.parse(verb, importlib.import_module(f"sparse_experts.cli.{verb}"), argv)
  if getattr(args, "config", None):
    flags.read_config(args)
  if getattr(args, "sweep", None):
    sweep.load(args.sweep)


def test_version(capsys):
  assert cli.main(["--version"]) == 0
  assert capsys.readouterr().out == (
      f"sparse_experts {VERSION}, jax {metadata.version('jax')}, python {platform.python_version()}\n")


def test_flags_are_not_abbreviated():
  with pytest.raises(flags.UserError):
    flags.parse("train", __import__("sparse_experts.cli.train", fromlist=["x"]), ["--work=a"])
