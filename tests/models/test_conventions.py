"""A config that sets no capacity and no sum of losses has those of each router's paper."""

import pytest
from flax import nnx

from sparse_experts.config import ROUTERS, load_config
from sparse_experts.errors import UserError
from sparse_experts.models import SparseLayer, build, even_load
from sparse_experts.models.sparse import SparseSpec
from sparse_experts.moe import Experts, MoELayer, expert_capacity, make_router
from sparse_experts.moe.registry import find_router
from sparse_experts.moe.routers.random import RandomRouter
from sparse_experts.moe.routing import Convention
from sparse_experts.training import objectives
from sparse_experts.validation import validate
from tests.models.tiny import VOCAB, tiny

MINE = f"{__name__}:Mine"
# Of groups of 16 tokens and 4 experts, the rules by hand: slots in training, in evaluation.
SLOTS = {
    "top_k": (5, 8),  # Switch: 1.25 and 2 times 4
    "no_token_left_behind": (5, 8),
    "v_moe": (12, 12),  # 1.05 * 2 * 16 / 4, up to a multiple of 4
    "limoe": (8, 8),
}


class Mine(RandomRouter):
  """A user's router that says nothing of capacity."""


def encoder(name, **model):
  """An encoder-decoder with that router."""
  router = dict(name=name) | model.pop("router", {})
  return tiny("seq2seq", **dict(capacity_factor=None, dispatch="scatter", router=router) | model)


def slots(config, decoder=False):
  """(training's, evaluation's) of 16 tokens and 4 experts, without building a layer."""
  found = []
  for phase in ("train", "eval_capacity"):
    spec = SparseSpec.from_config(config.model, phase)
    spec = spec.override(config.model.decoder) if decoder else spec
    fields = spec.capacity(find_router(spec.router["name"]).convention(spec.k))
    factor = fields.get("capacity_factor")
    found.append(fields.get("capacity_slots") if factor is None else expert_capacity(
        fields["capacity_rule"], 16, 4, spec.k, factor, fields["min_capacity"]))
  return tuple(found)


@pytest.mark.parametrize("name", [*ROUTERS, MINE])
def test_capacity_is_the_routers_own(name):
  config = encoder(name)
  assert slots(config) == SLOTS.get(name, (None, None))
  spec = SparseSpec.from_config(config.model, "dropless")
  assert spec.capacity(find_router(name).convention(spec.k)) == {"dispatch": "ragged"}


def test_a_model_has_it_in_both_phases():
  config = tiny("seq2seq", num_layers=1, moe_every=1, capacity_factor=None, router=dict(name="v_moe"))
  config.model.decoder.router.name = "hash"  # whose own is not the encoder's
  for phase in ("train", "eval_capacity"):
    layers = build(config, VOCAB, phase).sparse_layers
    assert {name: layer.capacity for name, layer in layers.items()} == {"encoder/00": 12, "decoder/00": None}


def test_top_k_is_switch_gshard_or_dropless_by_its_k():
  """GShard: 2 S / E slots, which an even load of two choices fills."""
  found = [slots(encoder("top_k", router=dict(k=k))) for k in (1, 2, 3, 4)]
  assert found == [(5, 8), (8, 8), (None, None), (None, None)]


def test_what_the_config_sets_comes_first():
  """A factor alone is counted by the router's rule, MegaBlocks' if it has none: 0.5 * 2 * 16 / 4."""
  assert slots(encoder("v_moe", eval_capacity_factor=0.0)) == (12, None)
  assert slots(encoder("top_k", capacity_factor=0.5, min_capacity=1)) == (2, 8)
  assert slots(encoder("dselect_k", capacity_factor=0.5)) == (4, None)
  assert slots(encoder("dselect_k", capacity_factor=0.5, capacity_rule="mesh", min_capacity=6)) == (6, None)


def test_a_number_of_slots_acts_in_training_and_evaluation():
  assert slots(encoder("hash", capacity_slots=3)) == (3, 3)
  config = encoder("top_k", capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=1)
  config.model.decoder.capacity_slots = 7  # replaces the encoder's factors
  assert (slots(config), slots(config, True)) == ((4, 8), (7, 7))
  config = encoder("top_k", capacity_slots=7)
  config.model.decoder.capacity_factor = 0.0  # and the other way round; the rest is the router's own
  assert (slots(config), slots(config, True)) == ((7, 7), (None, 8))


@pytest.mark.parametrize("prefix", ["model.", "model.decoder."])
def test_a_number_of_slots_and_a_factor_are_refused(prefix):
  config = load_config("configs/switch/tiny.py").unlock()
  section = config.model if prefix == "model." else config.model.decoder
  section.update(dict(capacity_slots=3, capacity_factor=1.5))
  with pytest.raises(UserError, match=f"{prefix}capacity_slots=3 and {prefix}capacity_factor=1.5 .*leave one "
                                      f"out, with --config.{prefix}capacity_slots=none or"):
    validate(config)


def test_a_layer_refuses_both_too():
  router, experts = make_router("top_k", 4, 2, rngs=nnx.Rngs(0)), Experts(2, 4, 4, rngs=nnx.Rngs(0))
  layer = MoELayer(router, experts, capacity_slots=3)
  assert layer.capacity(100) == 3 and layer.causality == "past" and not layer.is_dropless
  with pytest.raises(UserError, match="capacity_slots=3 and capacity_factor=1.0 both"):
    MoELayer(router, experts, capacity_slots=3, capacity_factor=1.0)
  with pytest.raises(UserError, match="capacity_slots=0 leaves no slots"):
    MoELayer(router, experts, capacity_slots=0)


def test_dropless_by_convention_takes_a_dispatch_that_is_made_for_it():
  """Of `scatter`, whose buffers would have a slot for every token; a config that sets 0 keeps its choice."""
  dispatch = lambda own, **model: SparseSpec.from_config(
      encoder("top_k", **model).model, "train").capacity(own)["dispatch"]
  assert dispatch(Convention()) == "ragged"
  assert dispatch(Convention(1.0)) == dispatch(Convention(), capacity_factor=0.0) == "scatter"


def test_losses_of_layers_add_up_as_each_router_does():
  """An encoder that averages its two layers, a decoder that sums its two; the config's word is for all."""
  config = tiny("seq2seq", num_layers=2, moe_every=1, router=dict(k=3, load_balance_weight=0.5))
  with config.model.decoder.router.unlocked():
    config.model.decoder.router.update(dict(name="noisy_top_k", importance_weight=0.25, load_weight=0.0))
  model, values = build(config, VOCAB), {"encoder/00": 8.0, "encoder/01": 16.0, "decoder/00": 4.0,
                                         "decoder/01": 12.0}
  loss = lambda layer: "load_balance" if layer.startswith("encoder") else "importance"
  assert objectives.coefficients(model, config) == {layer: {loss(layer): 0.25} for layer in values}
  sums = {"loss": (0.0, 1.0), "layers": {
      layer: {"losses": {loss(layer): (value, 1.0)}} for layer, value in values.items()}}
  weights = objectives.loss_weights(model)
  total = lambda: float(objectives.total(
      sums, objectives.whole(sums), weights, objectives.layer_losses(model, config))[0])
  assert total() == 0.5 * 12 + 0.25 * 16
  config.train.layer_losses = "mean"
  assert total() == (0.5 * 24 + 0.25 * 16) / 4
  assert objectives.coefficients(model, config)["decoder/01"] == {"importance": 0.0625}


def test_who_averages_over_layers():
  """Routers of more than two choices without a paper of their own: MegaBlocks', OLMoE's."""
  found = {(name, k): find_router(name).convention(k).layer_losses for name in ROUTERS for k in (1, 2, 3)}
  assert [case for case, how in found.items() if how != "sum"] == [("top_k", 3), ("no_token_left_behind", 3)]


def test_an_even_load_that_does_not_fit_is_said():
  layer = lambda capacity, k=1: SparseLayer({}, "batch", 4, k, 16, capacity, "self", None)
  assert even_load.warning({"a": layer(None), "b": layer(4), "c": layer(8, k=2)}) is None
  assert even_load.warning({"a": layer(4, k=2), "b": layer(8), "c": layer(4, k=2)}) == (
      "an even load does not fit: a, c: k=2 needs 8 slots per expert in a group of 16, there are 4, so 50%"
      " of assignments are dropped; raise the capacity, or set model.capacity_factor=0 (dropless)")
  assert "a, b, c and 3 more: k=1 needs 4 slots" in even_load.warning(dict.fromkeys("abcdef", layer(3)))
