"""What comes of another run's optimizer: the next update is the one that it would have made."""

import json
import os

import jax
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.models import names
from sparse_experts.models.build import build
from sparse_experts.tasks import task_of
from sparse_experts.training import init_from
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.state import abstract_state, make_state
from sparse_experts.training.step import make_train_step
from tests.training.tiny import documents, tiny_config, tiny_train

SPARSE = dict(model__num_experts=4, model__router__k=2, model__router__gate="renormalized",
              model__router__load_balance_weight=0.0, model__capacity_factor=0.0)
SHARED = dict(model__moe_layers=(1,), model__num_experts=0, optimizer__clip_norm=0.0)
CASES = {
    "t5": SHARED | dict(
        model__name="seq2seq", model__activation="geglu", data__objective="span_corruption",
        data__target_length=16,
        model__embed_dim=128, model__mlp_dim=128,  # so wide that Adafactor's moments are rows and columns
        optimizer__name="adafactor", optimizer__schedule="rsqrt"),
    "vit": SHARED | dict(
        model__name="vit", model__activation="gelu", data__objective="softmax", model__group_size=20,
        optimizer__schedule="cosine")}
IMAGES = [dict(image=np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8), label=i % 3)
          for i in range(40)]


class Part:
  """A run without its surroundings: its first states, and its steps."""

  def __init__(self, case, **keys):
    self.config = config = tiny_config(**CASES[case] | keys)
    task = task_of(config)
    source = task.as_source(IMAGES if case == "vit" else documents())
    self.vocabulary = task.make_vocabulary(source)
    self.model = build(config, self.vocabulary.vocab_size)
    self.mesh = partitioning.make_mesh(config.mesh.data, config.mesh.expert, config.mesh.model)
    self.optimizer = make_optimizer(config, self.model.axes)
    self.abstract = abstract_state(self.model, self.optimizer, self.mesh, config.mesh.fsdp)
    self.data = task.make_dataset("train", self.vocabulary, source)
    self.jitted = jax.jit(make_train_step(self.model, self.optimizer, config),
                          compiler_options={"xla_backend_optimization_level": 0})  # quick to compile

  def given(self):
    return init_from.read(self.config, self.abstract, self.model.axes, self.vocabulary)

  def state(self):
    given = self.given() if self.config.init_from else None
    with partitioning.use(self.mesh):
      return make_state(self.model, self.optimizer, 5, self.abstract, given)

  def step(self, state):
    rows = [self.data[8 * int(state.step) + i] for i in range(8)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    with partitioning.use(self.mesh):
      return self.jitted(state, batch, jax.random.key(1))[0]

  def save(self, folder, state):
    os.makedirs(folder, exist_ok=True)
    wd.keep(folder, self.config, self.vocabulary)
    with Checkpoints(wd.checkpoints(folder), 1) as checkpoints:
      checkpoints.save(state, {})


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
  """Case -> (folder, state) of a dense run after two steps, made up: counts of 2, each moment another."""
  rng, found = np.random.default_rng(0), {}
  made_up = lambda x: jax.device_put(np.full_like(x, 2) if x.dtype == np.int32 else
                                     rng.uniform(1e-4, 1e-3, x.shape).astype(np.float32), x.sharding)
  for case in CASES:
    folder, dense = str(tmp_path_factory.mktemp(case)), Part(case)
    state = dense.state()
    state = state.replace(step=made_up(state.step), opt_state=jax.tree.map(made_up, state.opt_state))
    dense.save(folder, state)
    found[case] = folder, state
  return found


def by_name(params):
  arrays = names.by_path(jax.device_get(params))
  return {name: arrays[at.path] if at.repeat is None else arrays[at.path][at.repeat]
          for name, at in names.places(params).items()}


def moments(case, state):
  """Moment -> array by the name of its parameter; and the counts that are of no parameter."""
  if case == "vit":
    adam, _, rate = state.opt_state
    return {"mu": by_name(adam.mu), "nu": by_name(adam.nu)}, (int(adam.count), int(rate.count))
  factored, _, rate = state.opt_state
  is_state = lambda node: isinstance(node, tuple)
  of = lambda kind: by_name(jax.tree.map(lambda s: getattr(s[0], kind), factored.inner, is_leaf=is_state))
  return {kind: of(kind) for kind in ("count", "v_row", "v_col", "v")}, int(rate.count)


def upcycled(case, folder, mode, **keys):
  return Part(case, init_from=folder, init_upcycle=True, init_optimizer=mode, **SPARSE, **keys)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_upcycled_with_its_moments_goes_on_as_its_parent(parents, case):
  """Where both are dense the first update is the parent's next: same gradient, same moments, same rate."""
  folder, before = parents[case]
  after = by_name(Part(case).step(before).params)
  run = upcycled(case, folder, "moments")
  states = {"moments": run.state(), "step": upcycled(case, folder, "step").state()}
  updates = {mode: by_name(run.step(state).params) for mode, state in states.items()}
  before = by_name(before.params)
  shared = [name for name in after if name in updates["moments"]]
  assert len(shared) > 20 and "encoder/01/ffn/w_in" not in shared
  off = {mode: max(np.abs(found[n] - after[n]).max() / np.abs(after[n] - before[n]).max() for n in shared)
         for mode, found in updates.items()}
  assert off["moments"] < 1e-4 and off["step"] > 1e-2  # gates sum to 1 up to rounding


@pytest.mark.parametrize("mesh", [
    pytest.param({}, id="one"),
    pytest.param(dict(mesh__data=2, mesh__expert=2, mesh__model=2, mesh__fsdp=True), id="2x2x2",
                 marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_moments_of_an_expert_are_its_ffns(parents, case, mesh):
  """Rows, columns and counts too, wherever they lie; the router's start anew."""
  folder, state = parents[case]
  expected, counts = moments(case, state)
  run = upcycled(case, folder, "moments", **mesh)
  found, own_counts = moments(case, run.state())
  assert counts == own_counts and {2} == {*np.atleast_1d(counts)}
  for kind, theirs in expected.items():
    for name, value in found[kind].items():
      where, _, part = name.partition("/experts/")
      if part:
        assert value.shape == (4, *theirs[f"{where}/{part}"].shape)
        value = value.reshape(value.shape or (1,))
        for expert in value:
          np.testing.assert_array_equal(expert, theirs[f"{where}/{part}"])
      else:
        np.testing.assert_array_equal(value, theirs.get(name, 0), err_msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_without_moments_the_schedule_alone_goes_on(parents, case):
  folder, _ = parents[case]
  for mode, step in (("step", 2), ("fresh", 0)):
    state = upcycled(case, folder, mode).state()
    found, counts = moments(case, state)
    assert int(state.step) == step
    assert counts == ((0, step) if case == "vit" else step)
    assert all(not value.any() for of_kind in found.values() for value in of_kind.values())


def test_a_run_goes_on_from_another_as_that_one_did(whole, tmp_path, capsys):
  """Nothing upcycled: with all that was carried, the last two of four steps end with the same bits."""
  run = tiny_train(tmp_path, init_from=f"{whole[0]}@2", init_optimizer="moments")
  for name, value in by_name(run.params).items():
    np.testing.assert_array_equal(value, by_name(whole[1].params)[name], err_msg=name)
  told = capsys.readouterr().err
  assert "continues from its step 2, with its moments" in told and "resuming" not in told
  rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  assert [row["step"] for row in rows if "loss" in row] == [3, 4]


MODES = ("moments", "step")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
  """Folders: a whole run, one that does not train its head, and one without an optimizer's state."""
  root = tmp_path_factory.mktemp("spoilt")
  part, frozen = Part("vit"), Part("vit", train__only="*,-head/*")
  part.save(str(root / "whole"), part.state())
  frozen.save(str(root / "frozen"), frozen.state())
  part.save(str(root / "none"), part.state().replace(opt_state=()))
  return root


@pytest.mark.parametrize("folder, mode, keys, message", [
    ("whole", "moments", dict(optimizer__name="adafactor"),
     "init_optimizer=moments: optimizer.name=adamw in .*whole and adafactor here, whose moments differ; "
     "set optimizer.name=adamw, or init_optimizer=step"),
    *(("whole", mode, dict(train__steps=0),
       f"init_optimizer={mode} continues from step 0 of .*whole, and train.steps=0 ends there; set "
       "train.steps above 0, or init_optimizer=fresh") for mode in MODES),
    ("whole", "moments", SPARSE | dict(init_upcycle=True, model__mlp_dim=48),
     "init_from=.*whole: encoder/01/ffn/b_in is 32 there, and an expert's encoder/01/ffn/experts/b_in 48 "
     "here; set model.expert_dim and widths to"),
    ("frozen", "moments", {},
     "init_optimizer=moments: .*frozen has no moments of head/b, which train.only left out there; set "
     "init_optimizer=step, or the same train.only"),
    *(("none", mode, {},
       f"init_optimizer={mode}: step 0 of .*none holds no optimizer's state, as of converted weights; set "
       "init_optimizer=fresh") for mode in MODES),
])
def test_what_does_not_fit_is_named(spoilt, folder, mode, keys, message):
  with pytest.raises(UserError, match=message) as caught:
    Part("vit", init_from=str(spoilt / folder), init_optimizer=mode, **keys).given()
  assert "\n" not in str(caught.value)


def test_what_is_frozen_in_both_needs_no_moments(spoilt):
  keys = dict(init_from=str(spoilt / "frozen"), init_optimizer="moments", train__only="*,-head/*")
  given = Part("vit", **keys).given()
  assert ("params", "head", "b") in given.sources
  assert {path[-2:] for path in given.sources if "nu" in path and "embedding" in path} == {
      ("embedding", name) for name in ("b", "cls", "position", "w")}
  assert not any("head" in path for path in given.sources if path[0] == "opt_state")
