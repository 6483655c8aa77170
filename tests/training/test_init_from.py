"""A run that starts from another's weights: what is taken, what is fresh, and what does not fit."""

import shutil

import jax
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.models import names
from sparse_experts.models.build import build
from sparse_experts.training import init_from
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Checkpoints, Steps
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.run import load
from sparse_experts.training.state import TrainState, abstract_state, make_state
from tests.training.tiny import documents, tiny_config, tiny_train


def read(config, tokenizer=None):
  """(what the run takes, how to make a state of it)."""
  model = build(config, 384)
  mesh = partitioning.make_mesh(config.mesh.data, config.mesh.expert, config.mesh.model)
  optimizer = make_optimizer(config, model.axes)
  abstract = abstract_state(model, optimizer, mesh, config.mesh.fsdp)
  given = init_from.read(config, abstract, model.axes, tokenizer or make_tokenizer("bytes"))

  def start(given):
    with partitioning.use(mesh):
      state = make_state(model, optimizer, 7, abstract, given)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
      assert (got.shape, got.dtype, got.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    return state

  return given, start


def by_name(tree, params=None):
  arrays = names.by_path(jax.device_get(tree))
  return {name: arrays[at.path] if at.repeat is None else arrays[at.path][at.repeat]
          for name, at in names.places(tree, params).items()}


def assert_values(found, expected):
  assert found.keys() == expected.keys()
  for name, value in found.items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_everything_is_taken(whole, tmp_path, capsys):
  other = tmp_path / "runs@home"  # a folder may have @ in its name
  shutil.copytree(whole[0], other)
  run = tiny_train(tmp_path / "new", init_from=f"{other}@2", train__steps=0, eval__train_windows=8,
                   eval__min_bytes=200)
  assert_values(by_name(run.params), by_name(load(str(whole[0]), 2).params))
  assert f"parameters from {other}@2, 0 fresh" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_needs_the_other_no_more(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "gone")
  keys = dict(init_from=str(tmp_path / "gone"), train__steps=1, eval__train_windows=8, eval__min_bytes=200)
  before = tiny_train(tmp_path / "new", **keys)
  shutil.rmtree(tmp_path / "gone")
  assert_values(by_name(tiny_train(tmp_path / "new", **keys).params), by_name(before.params))


@pytest.mark.parametrize("mesh", [
    pytest.param({}, id="one"),
    pytest.param(dict(mesh__data=2, mesh__expert=4, mesh__fsdp=True), id="2x4", marks=pytest.mark.slow)])
def test_a_dense_run_takes_what_it_shares_with_a_sparse_one(whole, mesh):
  """Its two layers lie in one array, those of the sparse run in two."""
  config = tiny_config(
      model__num_experts=0, init_from=str(whole[0]), init_take="*, -*/01/ffn/*,-decoder/norm/*", **mesh)
  given, start = read(config)
  state, fresh = start(given), start(None)
  found, theirs, own = by_name(state.params), by_name(whole[1].params), by_name(fresh.params)
  left_out = {n for n in found if n.startswith(("decoder/01/ffn/", "decoder/norm/"))}
  assert left_out and {n for n in found if found[n].shape == theirs.get(n, found[n]).shape} > left_out
  assert_values(found, {n: own[n] if n in left_out else theirs[n] for n in found})


def test_router_state_comes_with_its_router(tmp_path):
  config = tiny_config(model__router__name="tests.training.tiny:CountingRouter", init_from=str(tmp_path))
  shapes = jax.eval_shape(build(config, 384).init, jax.random.key(1))
  ones, zeros = (jax.tree.map(lambda x, v=v: np.full(x.shape, v, x.dtype), shapes) for v in (1, 0))
  wd.keep(str(tmp_path), config, make_tokenizer("bytes"))
  with Checkpoints(wd.checkpoints(str(tmp_path)), 1) as checkpoints:
    checkpoints.save(TrainState(np.zeros((), np.int32), *ones, ()), {})
  for take, taken in (("*", True), ("*/router/*", True), ("*,-*/router/*", False)):
    with config.unlocked():
      config.init_take = take
    given, _ = read(config)
    state = given.put_into(TrainState(0, *zeros, ()), given.arrays)
    assert_values(by_name(state.buffers, state.params), {"decoder/01/ffn/router/count": np.full(8, taken)})


@pytest.mark.parametrize("keys, message", [
    (dict(model__mlp_dim=64), r"init_from=.*: decoder/00/ffn/w_gate is \(16, 32\) there and \(16, 64\) here, "
     r".*w_in is .*, .* and \d more differ; exclude what .* with "
     r"init_take='\*,-decoder/00/ffn/w_gate', or use"),
    (dict(model__num_experts=0), r"decoder/01/ffn/w_gate is absent there and \(16, 32\) here"),
    (dict(model__num_layers=3, init_take="decoder/0?/attention/*"), r"decoder/02/attention/key is absent t"),
    (dict(init_take="*/fnn/router/*"), r"init_take='\*/fnn/router/\*': no parameter is called "
     r"'\*/fnn/router/\*'; did you mean 'decoder/\*/ffn/router/w'\?; `describe --parameters` lists"),
    (dict(init_take="*,-zzzzz"), r"no parameter is called 'zzzzz'; `describe"),
    (dict(init_take="*,-*"), r"init_take='\*,-\*' leaves no parameter; give patterns such as"),
    (dict(init_take=" ,"), r"leaves no parameter"),
    (dict(init_from="{whole}@two"), r"init_from=.*@two: 'two' is no step; write DIR or DIR@step"),
    (dict(init_from="{whole}@3"), r"has no step 3; choose from 2, 4"),
    (dict(init_from="no@where@3"), r"init_from=.*: there is no folder no@where; write DIR or DIR@step of a"),
    (dict(init_from="no@where"), r"init_from=.*: there is no folder no@where; write"),
    (dict(init_from="{empty}"), r"holds no checkpoint; train the run first"),
])
def test_what_does_not_fit_is_named(whole, tmp_path, keys, message):
  keys = dict(init_from=str(whole[0])) | keys
  keys["init_from"] = keys["init_from"].format(whole=whole[0], empty=tmp_path)
  with pytest.raises(UserError, match=message) as caught:
    read(tiny_config(**keys))
  assert "\n" not in str(caught.value)


def test_a_table_of_another_tokenizer_is_refused(whole):

  class Other:
    name, fingerprint = "sentencepiece", "another"

  with pytest.raises(UserError, match=r"embedding/table was trained with another tokenizer; set data.tokeniz"
                                      r"er=bytes, or leave it out with init_take='\*,-embedding/table'"):
    read(tiny_config(init_from=str(whole[0])), Other())
  given, _ = read(tiny_config(init_from=str(whole[0]), init_take="*,-embedding/table"), Other())
  assert ("params", "embedding", "table") not in given.arrays


def test_a_refused_start_leaves_the_folder_free(whole, tmp_path):
  with pytest.raises(UserError, match="no step"):
    tiny_train(tmp_path, init_from=f"{whole[0]}@two")
  assert wd.claim(str(tmp_path), tiny_config()) == {}


def test_a_config_that_is_not_the_checkpoints_is_named(whole):
  with pytest.raises(UserError, match=r"checkpoint .*4 is of another architecture: decoder/01/ffn/experts/"
                                      r"w_gate is \(8, 16, 32\) there and \(4, 16, 32\) here, .* use the c"):
    load(str(whole[0]), config=tiny_config(model__num_experts=4))


def test_only_what_is_taken_is_read(whole, monkeypatch):
  asked = []
  original = Steps.restore_arrays
  monkeypatch.setattr(Steps, "restore_arrays", lambda self, wanted, step: (
      asked.append(set(wanted)), original(self, wanted, step))[1])
  read(tiny_config(init_from=str(whole[0]), init_take="*/attention/key"))
  load(str(whole[0]))
  assert asked[0] == {("params", "decoder", "blocks", "0", i, "attention", "key") for i in "01"}
  assert {path[0] for path in asked[1]} == {"params"}


def test_experts_are_copies_of_a_dense_ffn(tmp_path):
  """With gates that sum to 1 and no drops the sparse model gives the dense one's logits."""
  dense = dict(model__num_experts=0, model__num_layers=3)
  parent = tiny_train(
      tmp_path / "dense", train__steps=1, eval__train_windows=8, eval__min_bytes=200, **dense)
  keys = dict(model__num_layers=3, model__moe_layers=(1,), model__num_experts=4, init_upcycle=True,
              init_from=str(tmp_path / "dense"))
  config = tiny_config(**keys, mesh__data=2, mesh__expert=2, mesh__model=2).unlock()
  config.model.router.k, config.model.router.gate = 2, "renormalized"
  given, start = read(config)
  state = start(given)
  found, theirs = by_name(state.params), by_name(parent.params)
  for name in ("w_in", "w_gate", "w_out"):
    for expert in found.pop(f"decoder/01/ffn/experts/{name}"):
      np.testing.assert_array_equal(expert, theirs[f"decoder/01/ffn/{name}"])
  assert np.abs(found.pop("decoder/01/ffn/router/w")).max() > 0
  assert_values(found, {name: theirs[name] for name in found})
  assert "0 fresh" not in init_from.summary(config, state.params, given)

  batch = {name: np.stack([parent.dataset("valid", documents())[i][name] for i in range(4)])
           for name in parent.dataset("valid", documents())[0]}
  model = build(config, 384, "dropless")
  params = jax.device_get(state.params)
  logits, _ = jax.jit(model.apply)(params, state.buffers, batch)
  expected, _ = parent.model(batch)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)  # gates sum to 1 up to rounding
  config.model.router.gate = "raw"
  raw, _ = jax.jit(build(config, 384, "dropless").apply)(params, state.buffers, batch)
  assert np.abs(raw - expected).max() > 1e-2

  config.model.expert_dim = 48
  with pytest.raises(UserError, match="decoder/01/ffn/w_gate is 16 x 32 there, and .* 16 x 48 here; set mo"):
    read(config)
  with pytest.raises(UserError, match="has no dense FFN in a layer that is sparse here; name a dense run"):
    read(tiny_config(**dense, init_upcycle=True, init_from=str(tmp_path / "dense")))
