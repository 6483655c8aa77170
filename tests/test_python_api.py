"""What a notebook does: the code of the documentation as printed, instances that runs remember, and seeds."""

import copy
import functools
import inspect
import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import sparse_experts
from sparse_experts import cli
from sparse_experts import config as config_module
from sparse_experts.errors import UserError
from sparse_experts.models import build
from sparse_experts.moe import TopKRouter
from sparse_experts.training import loop
from sparse_experts.training import run as run_module
from tests.texts import write_texts
from tests.training.tiny import documents, tiny_config

DOCS = pathlib.Path(__file__).parent.parent / "docs"
printed = lambda page: re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
NOTEBOOK, CARDS = printed("write_a_router.md")
FIRST, LAYER = printed("python.md")
SHORT = dict(train__steps=2, train__eval_every=100, eval__train_windows=8, eval__min_bytes=200)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
  """Runs of this file share what is compiled; the user's own cache is left alone."""
  before = jax.config.jax_compilation_cache_dir
  compilation_cache.reset_cache()
  jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
  yield
  compilation_cache.reset_cache()
  jax.config.update("jax_compilation_cache_dir", before)


def test_a_notebook_has_the_default_config_from_the_package_alone():
  """In a process of its own, where nothing else has imported `sparse_experts.config`; and without jax."""
  code = ("import sys, sparse_experts; sparse_experts.config.default_config(); "
          "sys.exit(bool({'jax', 'flax', 'grain', 'orbax'} & set(sys.modules)))")
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("ours, theirs", [
    (sparse_experts.train, loop.train), (sparse_experts.load, run_module.load)])
def test_functions_of_the_package_take_what_those_behind_them_take(ours, theirs):
  shapes = [[(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()
             if p.name != "notes"]  # which the command line alone has
            for f in (ours, theirs)]
  assert shapes[0] == shapes[1]


def statements(code):
  return [line for line in code.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
  """(folder, names) after the notebook of docs/write_a_router.md ran, on small runs and two seeds."""
  folder = tmp_path_factory.mktemp("notebook")
  write_texts(folder / "text", documents())
  config = tiny_config(**SHORT, data__source=f"files:{folder}/text", data__valid_share=0.3)
  names = {"__name__": "__main__"}
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setattr(config_module, "default_config", lambda: copy.deepcopy(config))
    longer = {"range(5)": "range(2)", "config.train.steps, config.eval.min_bytes = 100, 200_000": ""}
    assert all(NOTEBOOK.count(text) == 1 for text in longer)
    exec(functools.reduce(lambda code, pair: code.replace(*pair), longer.items(), NOTEBOOK), names)
  assert {path.name for path in (folder / "runs").iterdir()} == {"by_token", "switch"}
  return folder, names


@pytest.mark.slow
def test_a_router_of_a_notebook_is_trained_compared_and_traced(notebook, capsys):
  folder, names = notebook
  assert len(statements(NOTEBOOK)) < 30
  table = names["trace"].trace(names["run"], names["probe"].probe(names["run"]))
  np.testing.assert_array_equal(table["expert"], table["token_id"] % 8)
  told = names["compare"].report(*map(names["compare"].read_group, (
      str(folder / "runs/by_token"), str(folder / "runs/switch"))))
  assert "over 2 seeds" in told and "given.router ('ByToken' and None)" in told
  assert "dropped in training" not in told and "float32" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_router_of_a_notebook_is_named_in_a_config(notebook, monkeypatch):
  """The very class, from a module: the constructor takes what `build` gives."""
  folder, names = notebook
  module = types.ModuleType("a_module")
  module.ByToken = names["ByToken"]
  monkeypatch.setitem(sys.modules, "a_module", module)
  config = copy.deepcopy(sparse_experts.load(str(folder / "runs/switch/0")).config).unlock()
  config.model.router.name = "a_module:ByToken"
  config_module.trust("a_module:ByToken")
  layer, *_ = build(config, 260).sparse_layers.values()
  assert isinstance(layer.router, names["ByToken"]) and layer.num_experts == config.model.num_experts


@pytest.mark.slow
def test_cards_of_a_router_of_a_notebook_are_made_there_and_shown_by_report(notebook, monkeypatch, capsys):
  folder, names = notebook
  monkeypatch.chdir(folder)
  call = "cards.cards('runs/by_token/0', router=ByToken(...))"
  assert cli.main(["report", "--workdir=runs/by_token/0"]) == 0
  assert f"there, `from sparse_experts.report import cards; {call}`" in capsys.readouterr().err
  assert "<h4>Expert 3</h4>" not in (folder / "runs/by_token/0/report.html").read_text()
  assert len(CARDS.splitlines()) == 2
  exec(CARDS, names)
  assert cli.main(["report", "--workdir=runs/by_token/0"]) == 0
  assert "<h4>Expert 3</h4>" in (folder / "runs/by_token/0/report.html").read_text()


@pytest.mark.slow
def test_a_run_is_trained_and_called(notebook, monkeypatch):
  """The first lines of docs/python.md, with the notebook's small config."""
  folder, _ = notebook
  config = sparse_experts.load(str(folder / "runs/switch/0")).config
  monkeypatch.setattr(sparse_experts, "load_config", lambda name: copy.deepcopy(config).unlock())
  monkeypatch.chdir(folder)
  assert FIRST.count("steps = 100") == 1
  exec(FIRST.replace("steps = 100", "steps = 2"), names := {})
  (routing,) = names["routings"].values()
  assert names["logits_BLV"].shape[0] == 2 and routing.expert.size
  assert not names["zero"].parameters()["decoder/01/ffn/router/w"].any()


@pytest.mark.slow
def test_a_run_remembers_which_router_it_was_given(notebook):
  folder, names = notebook
  mine, switch = str(folder / "runs/by_token/0"), str(folder / "runs/switch/0")
  assert json.loads((folder / "runs/by_token/0/config.json").read_text())["given"]["router"] == "ByToken"
  with pytest.raises(UserError, match=r"by_token/0 was trained with router instance ByToken, not none; "
                                      r"load it in Python, .*load\('.*by_token/0', router=ByToken\(...\)\)"):
    sparse_experts.load(mine)
  with pytest.raises(UserError, match="was trained with router instance ByToken, not TopKRouter"):
    sparse_experts.load(mine, router=TopKRouter(16, 8, rngs=nnx.Rngs(0)))
  with pytest.raises(UserError, match=r"router instance none, not ByToken; .*load\('.*switch/0'\)"):
    sparse_experts.load(switch, router=names["router"])
  with pytest.raises(UserError, match="given.router='ByToken' there and None here"):
    sparse_experts.train(sparse_experts.load(switch).config, mine)


def test_a_wrong_router_is_refused_before_anything_is_written(tmp_path):

  class Wrong(TopKRouter):

    def __call__(self, *args):
      routing = super().__call__(*args)
      return routing.replace(gate=routing.gate * jnp.nan)

  config = tiny_config(**SHORT)
  with pytest.raises(UserError, match="^router Wrong: a gate is nan; gates are finite numbers"):
    sparse_experts.train(config, str(tmp_path), router=Wrong(16, 8, rngs=nnx.Rngs(0)), data=documents())
  with pytest.raises(UserError, match=r"test_python_api.py:\d+: router Raising, on vectors of width 16, "):
    sparse_experts.train(config, str(tmp_path), router=Raising(8, 8, rngs=nnx.Rngs(0)), data=documents())
  with pytest.raises(UserError, match="router TopKRouter is given, but model.num_experts=0 leaves no layer"):
    sparse_experts.train(tiny_config(model__num_experts=0), str(tmp_path), data=documents(),
                         router=TopKRouter(16, 8, rngs=nnx.Rngs(0)))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_data_of_ones_own_are_given_again(tmp_path):
  config = tiny_config(**SHORT | dict(train__steps=0))
  run = sparse_experts.train(config, data=documents(), workdir=str(tmp_path))
  assert len(run.dataset("valid", documents())) > 0
  with pytest.raises(UserError, match=r"trained on data given as list; give it here, dataset\(data=...\)"):
    run.dataset("valid")


def test_a_layer_in_a_model_and_loop_of_ones_own():
  assert len(statements(LAYER)) <= 20
  key_x, key_w = jax.random.split(jax.random.key(0))
  x_NBLD = jax.random.normal(key_x, (40, 2, 16, 8))
  target = jnp.abs(x_NBLD @ jax.random.normal(key_w, (8, 1)))
  names = {"batches": list(zip(x_NBLD, target, strict=True))}
  exec(LAYER, names)
  assert np.mean(names["losses"][-5:]) < 0.5 * np.mean(names["losses"][:5])


class Raising(TopKRouter):

  def __call__(self, x_GTD, tokens, capacity, key=None):
    return super().__call__(x_GTD @ jnp.eye(16), tokens, capacity, key)


def seen(folder, **keys):
  """What a run is about to begin with: initial values, the first batch, and the key of all noise."""
  found = {}

  def steps(setup, state, feed, *rest):
    found.update(jax.device_get(dict(
        init=state.params, data=next(feed)["targets"], noise=jax.random.key_data(setup.key))))
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop, "_steps", steps)
    sparse_experts.train(tiny_config(**keys), str(folder), data=documents())
  return found


@pytest.mark.slow
def test_each_seed_changes_its_own_thing_only(tmp_path):
  base = seen(tmp_path / "base")
  same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
  for name in config_module.SEEDS:
    other = seen(tmp_path / name, **{f"seed__{name}": 5})
    assert {n for n in base if not same(base[n], other[n])} == {name}
