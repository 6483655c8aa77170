"""Names of code in a config: what is no router or source is not called, what is saved is not imported."""

import json
import re
import sys

import pytest
from flax import nnx

from sparse_experts import cli, config
from sparse_experts.config import code_names, default_config, read_config, to_json
from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.models import build
from sparse_experts.moe import make_router
from sparse_experts.tasks import task_of
from sparse_experts.training.run import load

MODULE = """
import pathlib
here = pathlib.Path(__file__).parent
(here / "imported").touch()
def called(*args, **kwargs): (here / "called").touch()
def two(config_data, more): (here / "called").touch()
class Two:
  def __init__(self, *args, **kwargs): (here / "called").touch()
class Callable:
  def __call__(self, *args, **kwargs): (here / "called").touch()
thing = Callable()
"""


@pytest.fixture
def strange(tmp_path, monkeypatch):
  """Folder of a module `strange` that leaves a file when it is imported, and one when it is called."""
  (tmp_path / "strange.py").write_text(MODULE)
  (tmp_path / "torn.py").write_text("def f(:")
  (tmp_path / "raises.py").write_text("raise RuntimeError('two\\nlines')")
  (tmp_path / "lacks.py").write_text("import nowhere_at_all")
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setattr(code_names, "_saved", {})
  monkeypatch.setattr(code_names, "_trusted", set())
  yield tmp_path
  for name in ("strange", "torn", "raises", "lacks"):
    sys.modules.pop(name, None)


@pytest.mark.parametrize("name, expected", [
    ("os:system", "is of type builtin_function_or_method, not a class derived from sparse_experts.moe.Rout"),
    ("builtins:exec", "is of type builtin"), ("builtins:dict", "is the class dict"),
    ("pathlib:Path", "is the class Path"), ("sparse_experts.moe:ROUTERS", "is of type dict"),
    ("sparse_experts.moe:MoELayer", "is the class MoELayer"), ("strange:called", "is of type function"),
    ("strange:Two", "is the class Two"), ("strange:thing", "is of type Callable"),
    ("strange:nothing", "cannot be imported.*nothing"), ("strange:", "cannot be imported"),
    (":called", "cannot be imported"), (".strange:called", "cannot be imported"),
    ("torn:f", "cannot be imported"), ("raises:f", "cannot be imported: two"),
    ("lacks:f", "cannot be imported.*nowhere_at_all")])
def test_what_is_no_router_is_not_called(name, expected, strange):
  for outer in (dict(name=name), dict(name="permuted", of=name)):
    with pytest.raises(UserError, match=f"(?s)router.*{expected}.*|router.of='{re.escape(name)}'"):
      make_router(**outer, d=4, num_experts=4, rngs=nnx.Rngs(0))
  assert not (strange / "called").exists()


@pytest.mark.parametrize("name, expected", [
    ("os:system", "standard library"), ("subprocess:Popen", "standard library"),
    ("builtins:open", "standard library"), ("strange:two", "takes config.data"),
    ("strange:thing", "takes config.data"), ("strange:here", "no function")])
def test_what_is_no_source_is_not_called(name, expected, strange):
  given = default_config().unlock()
  given.data.source = name
  with pytest.raises(UserError, match=f"data.source='{name}'.*{expected}"):
    task_of(given).open_source()
  assert not (strange / "called").exists()


def saved(folder, **keys):
  """A folder whose config.json names code, as far as a run gets before its checkpoints are read."""
  run = folder / "run"
  run.mkdir(exist_ok=True)
  made = default_config().unlock()
  made.update_from_flattened_dict(keys)
  (run / "config.json").write_text(to_json(made))
  (run / "tokenizer.model").write_bytes(make_tokenizer("bytes").serialize())
  return str(run)


@pytest.mark.parametrize("keys", [
    {"model.router.name": "strange:called"}, {"model.router.name": "strange:Two"},
    {"model.name": "seq2seq", "data.objective": "span_corruption",
     "model.decoder.router.name": "strange:called"}])
def test_the_router_of_a_saved_config_is_not_imported(keys, strange, capsys):
  run = saved(strange, **keys)
  key, name = list(keys.items())[-1]
  for argv in (["evaluate"], ["sample", "--prompt=a"]):
    assert cli.main([*argv, f"--workdir={run}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{key}='{name}'" in said, said
    assert f"repeat it: --config.{key}={name}," in said, said
  with pytest.raises(UserError, match=r"in Python sparse_experts.config.trust\('strange:"):
    load(run)
  with pytest.raises(UserError, match="names code outside the package"):
    build(read_config(run), 16)
  assert not (strange / "imported").exists()

  assert cli.main(["evaluate", f"--workdir={run}", f"--config.{key}={name}"]) == 2
  assert "holds no checkpoint" in capsys.readouterr().err
  with pytest.raises(UserError, match="not a class derived from"):
    build(read_config(run), 16)
  assert (strange / "imported").exists() and not (strange / "called").exists()


def test_a_wrapped_router_of_a_saved_config_is_not_imported(strange):
  run = saved(strange)
  content = json.loads((strange / "run" / "config.json").read_text())
  content["model"]["router"] |= {"name": "permuted", "of": "strange:called"}
  (strange / "run" / "config.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"router\.of='strange:called'"):
    build(read_config(run), 16)
  assert not (strange / "imported").exists()


def test_the_source_of_a_saved_config_is_not_imported(strange):
  run = saved(strange, **{"data.source": "strange:called"})
  with pytest.raises(UserError, match=r"data\.source='strange:called', which runs when it is loaded"):
    task_of(read_config(run)).open_source()
  assert not (strange / "imported").exists()
  config.trust("strange:called")
  with pytest.raises(UserError, match="gives NoneType"):
    task_of(read_config(run)).open_source()
  assert (strange / "called").exists()


def test_what_the_user_writes_is_loaded_whatever_is_saved(strange):
  """A config that `train` gets is the user's, and repeating another key of a run changes nothing else."""
  run = saved(strange, **{"model.router.name": "strange:called"})
  read_config(run)
  mine = default_config().unlock()
  mine.model.router.name = "strange:called"
  code_names.trust_all(mine)
  with pytest.raises(UserError, match="not a class derived from"):
    build(mine, 16)
  with pytest.raises(UserError, match="not a class derived from"):
    build(read_config(run), 16)


def test_a_key_of_a_run_may_be_repeated_but_not_changed(strange, capsys):
  run = saved(strange)
  assert cli.main(["evaluate", f"--workdir={run}", "--config.model.num_layers=4"]) == 2
  assert "checkpoint" in capsys.readouterr().err  # it went on to those
  assert cli.main(["evaluate", f"--workdir={run}", "--config.model.num_layers=5"]) == 2
  assert "model.num_layers: evaluate cannot change what was trained" in capsys.readouterr().err
