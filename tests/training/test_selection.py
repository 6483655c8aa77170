"""Training some parameters only: the others neither move nor cost optimizer memory or gradients."""

import functools

import jax
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.models import names
from sparse_experts.models.build import build
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.init_from import summary
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.selection import choose, merge, trained, trained_buffers
from sparse_experts.training.state import abstract_state, make_state
from sparse_experts.training.step import make_train_step
from tests.training.tiny import tiny_config
from tests.training.toy import ToyModel, toy_batch, toy_config

MODEL = ToyModel(experts=8)
ONLY = "stack/*,head"
MOVING, FROZEN = {"stack/router", "stack/w", "head"}, {"embed"}


class Baked(ToyModel):
  """The toy with what is frozen written into it: its parameters are the others."""

  def _keep(self, tree):
    return {name: x for name, x in tree.items() if name not in FROZEN}

  @property
  def axes(self):
    return self._keep(super().axes)

  def init(self, key):
    params, buffers = super().init(key)
    return self._keep(params), buffers

  def apply(self, params, *args, **kwargs):
    return super().apply(super().init(jax.random.key(0))[0] | params, *args, **kwargs)


def config_of(only, optimizer="adamw", accumulate=1):
  config = toy_config(accumulate=accumulate, only=only)
  config.optimizer.update(dict(name=optimizer, clip_norm=0.05, weight_decay=0.1))  # a norm that clips
  return config


@functools.cache
def _run(model, only, optimizer="adamw", mesh=(1, 1, 1), accumulate=1):
  config, mesh = config_of(only, optimizer, accumulate), partitioning.make_mesh(*mesh)
  with partitioning.use(mesh):
    rule = make_optimizer(config, model.axes)
    abstract = abstract_state(model, rule, mesh, fsdp=mesh.size > 1)
    state = make_state(model, rule, 0, abstract)
    start = jax.device_get(state.params)
    step = jax.jit(make_train_step(model, rule, config))
    for i in range(3):
      rows = jax.device_put(toy_batch(i), partitioning.batch_sharding(mesh))
      state, metrics = step(state, rows, jax.random.key(0))
  return jax.device_get(state), jax.device_get(metrics), abstract, start


@pytest.mark.parametrize("case", [
    dict(accumulate=2), pytest.param(dict(mesh=(2, 4, 1), optimizer="adafactor"), marks=pytest.mark.slow)],
    ids=str)
def test_equal_to_training_a_model_without_what_is_frozen(case, tmp_path):
  state, metrics, abstract, start = _run(MODEL, ONLY, **case)
  baked, expected, *_ = _run(Baked(experts=8), "*", **{k: v for k, v in case.items() if k != "mesh"})
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6)  # sums in another order
  for name in FROZEN:
    np.testing.assert_array_equal(state.params[name], start[name])
  for name in baked.params:
    jax.tree.map(close, state.params[name], baked.params[name])
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(
        *map(jax.tree.leaves, (state.params[name], start[name])), strict=True))
  jax.tree.map(close, metrics, expected)  # grad_norm too: that of what trains
  assert len(jax.tree.leaves(state.opt_state)) == len(jax.tree.leaves(baked.opt_state))
  assert not [path for path in names.by_path(state.opt_state) if FROZEN & set(path)]

  with Checkpoints(str(tmp_path), 1) as checkpoints:
    checkpoints.save(state, {})
    checkpoints.wait()
    restored = checkpoints.restore(abstract, 3)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state)


def test_nothing_is_computed_for_what_is_frozen():
  """The embedding's gradient is a scatter-add over the vocabulary: it is not in the program."""

  def scatters(only):
    config = config_of(only)
    rule = make_optimizer(config, MODEL.axes)
    state = abstract_state(MODEL, rule, partitioning.make_mesh(), False)
    return str(jax.make_jaxpr(make_train_step(MODEL, rule, config))(
        state, toy_batch(), jax.random.key(0))).count("scatter-add")

  assert scatters(ONLY) < scatters("*")


def test_router_state_rests_with_its_router():
  state, *_ = _run(MODEL, "embed,head")
  assert not state.buffers["stack"]["calls"].any()
  assert _run(MODEL, ONLY)[0].buffers["stack"]["calls"].any()  # a run of the test above
  moves = trained_buffers({"a": {"w": False}}, {"a": {"x": 1}, "b": {"y": 1}})
  assert moves == {"a": {"x": False}, "b": {"y": True}}


def test_patterns():
  known = ["a/w", "a/b", "c/w"]
  chosen = lambda patterns: choose("key", patterns, known)
  assert chosen("*") == chosen("*/*") == set(known)
  assert chosen("*/w") == {"a/w", "c/w"}
  assert chosen(" a/* , c/?") == set(known)
  assert chosen("-a/*") == chosen("*,-a/*") == chosen("-a/w,-a/b,*") == {"c/w"}  # in any order
  assert merge({"a": None, "b": 1}, {"a": 2, "b": None}) == {"a": 2, "b": 1}


@pytest.mark.parametrize("only, message", [
    ("decoder/00/*", r"train.only='decoder/00/\*' names decoder/00/attention/key but not "
     r"decoder/01/attention/key, which lies in the same array \(that of layers 00, 01\); name all of "
     r"these layers, or none"),
    ("*,-decoder/01/ffn/w_in", r"names decoder/00/ffn/w_in but not decoder/01/ffn/w_in"),
    ("*/atention/*", r"train.only='\*/atention/\*': no parameter is called '\*/atention/\*'; did you mean "
     r"'decoder/\*/attention/\w+'\?; `describe --parameters` lists the names"),
    ("-*", r"train.only='-\*' leaves no parameter"),
    ("", r"train.only='' leaves no parameter"),
])
def test_patterns_that_cannot_be(only, message):
  config = tiny_config(model__num_experts=0, train__only=only)
  model = build(config, 384)
  with pytest.raises(UserError, match=message) as caught:
    abstract_state(model, make_optimizer(config, model.axes), partitioning.make_mesh(), False)
  assert "\n" not in str(caught.value)


def test_the_summary_counts():
  config = tiny_config(train__only="-*/experts/*")
  params, _ = jax.eval_shape(build(config, 384).init, jax.random.key(0))
  experts = 3 * 8 * 16 * 32
  total = sum(x.size for x in jax.tree.leaves(params))
  told = summary(config, params, None)
  assert told == f"{total - experts:,} parameters train, {experts:,} are frozen"
  assert summary(tiny_config(), params, None) == ""
  assert jax.tree.leaves(trained(config, params)).count(False) == 3
