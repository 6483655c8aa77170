"""A replay is the model that another config builds, on the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparse_experts.analysis.probe import probe
from sparse_experts.analysis.replay import CONVENTIONS, _changed, replay
from sparse_experts.errors import UserError
from sparse_experts.models.build import build
from sparse_experts.moe import TopKRouter
from tests.analysis.tiny_run import SEQ2SEQ, bare_run, tiny_dataset, tiny_run


@functools.cache
def case():
  """(run, a batch of 11 records): parts of 8 rows, the last filled up."""
  run = tiny_run(model__group_size=64)
  return run, probe(run, 11, tiny_dataset(run))


@functools.cache
def played(**arguments):
  return replay(*case(), **arguments)


def test_the_same_routing_agrees_and_has_the_same_loss():
  numbers = played()
  assert numbers["agreement"] == 1 and numbers["loss"] == numbers["original_loss"]
  assert numbers["dropped"] > 0 and numbers["fresh"] == []


def test_a_capacity_drops_and_the_router_wishes_the_same():
  numbers = played(capacity_factor=0.3)
  assert numbers["dropped"] > played()["dropped"] and numbers["agreement"] == 1
  np.testing.assert_allclose(numbers["original_loss"], played()["loss"], rtol=1e-6)  # another program
  assert abs(numbers["loss"] - numbers["original_loss"]) > 1e-4


def test_a_dispatch_moves_rows_and_changes_no_number():
  numbers, expected = played(dispatch="scatter", capacity_factor=0.3), played(capacity_factor=0.3)
  np.testing.assert_allclose(numbers["loss"], expected["loss"], rtol=1e-6)
  assert numbers["dropped"] == expected["dropped"]


@pytest.mark.slow
def test_gshard_is_what_its_config_builds():
  run, batch = case()
  numbers = replay(run, batch, convention="gshard")
  config = run.config.copy_and_resolve_references().unlock()
  config.model.router.k, config.model.router.gate = 2, "renormalized"
  config.model.capacity_rule, config.model.capacity_factor = "lingvo", 2.0
  model = build(config, run.tokenizer.vocab_size)
  batch = {name: np.pad(a, ((0, 1),) + ((0, 0),) * (a.ndim - 1)) for name, a in batch.items()}
  logits, routings = jax.jit(functools.partial(model.apply, trace=True))(run.params, run.buffers, batch)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])[batch["weights"] > 0]
  np.testing.assert_allclose(numbers["loss"], loss.mean(), rtol=1e-5)
  lost, wanted = (sum(r.metrics["dropped"][i] for r in routings.values()) for i in (0, 1))
  np.testing.assert_allclose(numbers["dropped"], lost / wanted, rtol=1e-6)
  assert numbers["agreement"] == 0, "one expert then, two now"


def test_a_convention_holds_in_both_stacks():
  """Also where the decoder had a k of its own; what the convention leaves open stays the decoder's."""
  run = bare_run(**SEQ2SEQ)
  model = build(_changed(run.config, None, "gshard", None, None), run.tokenizer.vocab_size)
  layers = [(layer.k, layer.num_experts, layer.router.gate, layer.capacity)
            for layer in model.sparse_layers.values()]
  assert layers == [(2, 4, "renormalized", 16), (2, 8, "renormalized", 8)]  # up to a multiple of 4
  assert run.config.model.decoder.router.k == 3, "the run's own config is untouched"


def test_conventions_fix_what_their_systems_fix():
  """Slots of groups of 64 tokens for 8 experts: the rules of the four codebases, by hand."""
  run = case()[0]
  found = {}
  for name in CONVENTIONS:
    model = build(_changed(run.config, None, name, None, None), run.tokenizer.vocab_size)
    (layer,) = model.sparse_layers.values()
    found[name] = (layer.k, layer.router.gate, layer.router.order, layer.router.balance_count, layer.capacity)
  assert found == {
      "switch": (1, "raw", "choice", "first", 10), "gshard": (2, "renormalized", "choice", "first", 16),
      "st_moe": (2, "renormalized", "choice", "first", 10), "v_moe": (2, "raw", "choice", "first", 20),
      "mixtral": (2, "renormalized", "choice", "multi_hot", None),
      "olmoe": (8, "raw", "choice", "assignments", None),
      "flaxformer": (1, "raw", "choice", "multi_hot", 10),
      "maxtext": (1, "renormalized", "token", "assignments", 10)}


class Biased(TopKRouter):
  """Top-1 with a bias that the run does not know."""

  def __init__(self, d, num_experts, *, rngs):
    super().__init__(d, num_experts, rngs=rngs)
    self.b = nnx.Param(jnp.full(num_experts, 7.0), axes=("router",))


def test_another_router_takes_the_runs_weights_where_it_can():
  """A new instance's own `w` gives way to the run's; a parameter that is new is named."""
  numbers = replay(*case(), router=Biased(16, 8, rngs=nnx.Rngs(5)))
  assert numbers["fresh"] == ["decoder/01/ffn/router/b"]
  assert numbers["agreement"] == 1 and numbers["loss"] == numbers["original_loss"]


def test_a_router_by_name_has_its_default_arguments():
  """Those of the run's are another class's."""
  config = bare_run(model__router__k=2, model__router__jitter=0.1).config
  router = _changed(config, "package.module:Class", None, None, None).model.router
  assert router.name == "package.module:Class"
  assert all(value is None for name, value in router.items() if name != "name")


@pytest.mark.parametrize("arguments, message", [
    (dict(convention="gshrad"), "convention='gshrad' is unknown; did you mean 'gshard'?"),
    (dict(convention="gshard", router="top_k"), "convention='gshard' says which router; leave out router="),
    (dict(router="topk"), "router.name='topk' is unknown; did you mean 'top_k'?"),
    (dict(dispatch="rugged"), "dispatch='rugged' is unknown; did you mean 'ragged'?"),
    (dict(capacity_factor=-1.0), "capacity_factor=-1.0 leaves no slots"),
])
def test_mistakes_are_named(arguments, message):
  with pytest.raises(UserError) as found:
    replay(*case(), **arguments)
  assert message in str(found.value)
