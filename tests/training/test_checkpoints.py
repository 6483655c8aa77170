"""States on disk: exact, on any mesh, and which of them stay."""

import jax
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.state import abstract_state
from tests.training.toy import ToyModel, toy_config


def _abstract(name="adamw", mesh=(1, 1), fsdp=False):
  config, model = toy_config(), ToyModel(experts=8)
  config.optimizer.name = name
  return abstract_state(model, make_optimizer(config, model.axes), partitioning.make_mesh(*mesh), fsdp)


def _state(*args, **kwargs):
  """(a state with other values in each place, its abstract)."""
  abstract = _abstract(*args, **kwargs)
  leaves, tree = jax.tree.flatten(abstract)
  values = [np.arange(x.size).reshape(x.shape).astype(x.dtype) + i for i, x in enumerate(leaves)]
  placed = [jax.device_put(v, x.sharding) for v, x in zip(values, leaves, strict=True)]
  return jax.tree.unflatten(tree, placed).replace(step=jax.numpy.zeros((), "int32")), abstract


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_saved_on_eight_devices_restored_on_any(name, tmp_path):
  state, _ = _state(name, (2, 4), fsdp=True)
  with Checkpoints(str(tmp_path), 1) as checkpoints:
    checkpoints.save(state, {"data_fingerprint": "x"})
  for mesh in ((1, 1), (1, 8), (2, 4)):
    abstract = _abstract(name, mesh)
    with Checkpoints(str(tmp_path)) as checkpoints:
      restored = checkpoints.restore(abstract, 0)
      assert checkpoints.meta(0)["data_fingerprint"] == "x"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(restored))
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
      assert got.sharding == wanted.sharding and got.dtype == wanted.dtype


def test_a_part_is_read_alone(tmp_path):
  state, abstract = _state(mesh=(2, 4))
  with Checkpoints(str(tmp_path), 1) as checkpoints:
    checkpoints.save(state, {})
  with Checkpoints(str(tmp_path)) as checkpoints:
    shapes = jax.tree.map(lambda x: tuple(x.shape), checkpoints.tree(0))
    assert shapes["params"] == jax.tree.map(lambda x: x.shape, state.params)
    part = checkpoints.restore_part({"params": {"head": abstract.params["head"]}}, 0)
  jax.tree.map(np.testing.assert_array_equal, part, {"params": {"head": state.params["head"]}})
  assert part["params"]["head"].sharding == abstract.params["head"].sharding


def test_the_last_and_the_best_stay(tmp_path):
  state, abstract = _state()
  with Checkpoints(str(tmp_path), 2) as checkpoints:
    for step, loss in enumerate([5.0, 1.0, None, 3.0, 4.0], start=1):
      checkpoints.save(state.replace(step=state.step + step), {}, loss)
  with Checkpoints(str(tmp_path)) as checkpoints:
    assert checkpoints.steps() == [2, 4, 5]
    assert (checkpoints.latest(), checkpoints.choose(None)) == (5, 5)
    assert int(checkpoints.restore(abstract, 2).step) == 2
    with pytest.raises(UserError, match="no step 3; choose from 2, 4, 5"):
      checkpoints.choose(3)


def test_a_save_is_of_its_moment(tmp_path):
  """The step that follows reuses the state's memory while the save is still writing."""
  state = {"x": jax.numpy.arange(2_000_000.0)}
  full = _state()[0].replace(params=state, buffers={}, opt_state={})
  after = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  with Checkpoints(str(tmp_path), 5) as checkpoints:
    for _ in range(4):
      checkpoints.save(full, {})
      full = after(full)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), full)
  with Checkpoints(str(tmp_path)) as checkpoints:
    for step in range(4):
      np.testing.assert_array_equal(
          checkpoints.restore(abstract, step).params["x"], np.arange(2_000_000, dtype=np.float32) + step)


def test_an_unfinished_save_is_ignored_and_removed(tmp_path):
  state, _ = _state()
  with Checkpoints(str(tmp_path), 2) as checkpoints:
    checkpoints.save(state, {})
  (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
  with Checkpoints(str(tmp_path)) as checkpoints:
    assert checkpoints.latest() == 0
  assert (tmp_path / "7.orbax-checkpoint-tmp").exists()  # reading touches nothing
  with Checkpoints(str(tmp_path), 2) as checkpoints:
    assert checkpoints.latest() == 0
    checkpoints.save(state.replace(step=state.step + 1), {})  # removing goes on in the background till then
  assert not (tmp_path / "7.orbax-checkpoint-tmp").exists()


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
  with Checkpoints(str(tmp_path), 2) as checkpoints, pytest.raises(UserError, match="holds no checkpoint"):
    checkpoints.choose(None)
