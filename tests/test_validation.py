"""What is known of a config without jax: its keys, and the mistakes that are named before it is imported."""

import json
import math
import re

import jax.numpy as jnp
import pytest

from sparse_experts import moe
from sparse_experts.config import default_config, dense_twin, from_json, paths, to_json
from sparse_experts.config.derived import routing_field, sparse_indices
from sparse_experts.config.dotted import replaced
from sparse_experts.config.key import CONVERT, EVALUATE, LOG, PLACE, RANGES, RESULT, SPEED, TRAINING
from sparse_experts.config.schema import KEYS, MAY_CHANGE_ON_RESUME, may_change
from sparse_experts.errors import UserError
from sparse_experts.models import attention, blocks, build
from sparse_experts.models.build import MODELS
from sparse_experts.moe import heads, ternary_experts
from sparse_experts.moe.experts import get_activation
from sparse_experts.moe.grouped import layout
from sparse_experts.moe.routers import top_k
from sparse_experts.moe.routing import lists, losses
from sparse_experts.tasks import TASKS
from sparse_experts.training import objectives, optimizer
from sparse_experts.validation import GATED, validate


@pytest.mark.parametrize("key, table", [
    ("model.activation", moe.ACTIVATIONS),
    ("model.name", MODELS),
    ("model.attention.name", blocks.ATTENTIONS),
    ("model.attention.qk_norm", attention.QK_NORMS),
    ("model.dispatch", moe.DISPATCHES),
    ("model.backend", layout.BACKENDS),
    ("model.moe_projections", heads.PROJECTIONS),
    ("model.ternary.norm", ternary_experts.NORMS),
    ("model.capacity_rule", moe.CAPACITY_RULES),
    ("model.router.choose", top_k.CHOOSE),
    ("model.router.gate", top_k.GATES),
    ("model.router.order", lists.ORDERS),
    ("model.router.balance_count", top_k.BALANCE_COUNTS),
    ("model.router.scope", losses.SCOPES),
    ("model.router.loss_padding", top_k.LOSS_PADDING),
    ("optimizer.name", optimizer.OPTIMIZERS),
    ("optimizer.schedule", optimizer.SCHEDULES),
    ("train.layer_losses", objectives.LAYER_LOSSES),
])
def test_choices_match_the_tables(key, table):
  assert set(KEYS[key].choices) == set(table)


@pytest.mark.parametrize("key, built, expected", [
    ("model.moe_place", lambda model: {name.partition("/attention")[1] for name in model.sparse_layers}, {
        "ffn": {""}, "attention": {"/attention"}, "both": {"", "/attention"}}),
    ("model.pool", lambda model: "cls" in model.axes["embedding"], {"token": True, "mean": False}),
    ("model.dtype", lambda model: model.dtype, {name: jnp.dtype(name) for name in ("float32", "bfloat16")}),
])
def test_choices_without_a_table_are_what_models_tell_apart(key, built, expected):
  """Every choice makes a model, and each another one."""
  made = {}
  for choice in KEYS[key].choices:
    name = key.removeprefix("model.")
    config = config_of("vit" if name == "pool" else "decoder", {name: choice})
    made[choice] = built(build(config, 32))
  assert made == expected


def test_objectives_are_the_tasks():
  """A task is one line of TASKS, so that the schema only tells of them; `tasks.check` refuses others."""
  objective = KEYS["data.objective"]
  assert not objective.choices and set(TASKS) <= set(re.findall(r"\w+", objective.meaning))
  with pytest.raises(UserError, match="data.objective='causl' is unknown; did you mean 'causal'"):
    validate(replaced(default_config(), {"data.objective": "causl"}))


def test_gated_activations_are_those_that_have_a_gate():
  assert set(GATED) == {name for name in moe.ACTIVATIONS if get_activation(name)[1]}


def test_every_number_has_a_range_and_a_meaning():
  assert list(KEYS) == list(dict.fromkeys(KEYS)) and set(KEYS) == set(paths(default_config()))
  for key in KEYS.values():
    assert (key.type in (int, float)) == bool(key.within), key.name
    assert key.within in ("", *RANGES) and key.affects in (RESULT, TRAINING, SPEED, PLACE, LOG), key.name
    assert key.meaning and not key.meaning.endswith("."), key.name
    key.check(key.value)


@pytest.mark.parametrize("huge", [10**12 * 2**70, 1e30, 1e300, math.inf, -math.inf, math.nan, -10**30])
def test_every_number_is_bounded_on_both_sides(huge):
  for key in KEYS.values():
    # A rate that float32 holds is one with which a run diverges, which a sweep may ask for.
    if key.within and not (key.name == "optimizer.learning_rate" and 0 <= huge <= 10**38):
      with pytest.raises(UserError, match=f"^{key.name}=.* is out of range; choose "):
        key.check(huge)
      assert key.most >= (key.value or 0)


@pytest.mark.parametrize("key, value, expected", [
    ("model.embed_dim", 99999999999, "choose 1 or more, at most 2,147,483,647"),
    ("model.capacity_factor", 1e30, "choose 0 or more, at most 1,048,576"),
    ("model.num_layers", 10**6, "at most 2,048"), ("train.seed", 2**64, "at most 9,223,372,036,854,775,807"),
    ("seed.data", 2**63, "at most 9,.*"), ("train.batch_size", 2**31, "at most 1,048,576"),
    ("data.image.shift", 10**9, "at most 4,096"), ("data.image.randaugment_layers", 10**9, "at most 100"),
    ("model.router.z_weight", 1e30, "at most 2,147,483,647"), ("train.steps", 2**31, "at most 2,.*"),
])
def test_numbers_that_nothing_can_hold(key, value, expected):
  with pytest.raises(UserError, match=rf"{key}=.* is out of range; .*{expected}$"):
    validate(replaced(default_config(), {key: value}))


def test_a_resume_may_change_what_cannot_change_the_result():
  free = {name for name, key in KEYS.items() if key.affects in (SPEED, PLACE, LOG)}
  assert MAY_CHANGE_ON_RESUME - free == {"train.steps", "train.skip_nonfinite", "given.data"}
  assert free <= MAY_CHANGE_ON_RESUME
  assert {"mesh.fsdp", "model.dispatch", "model.decoder.dispatch", "model.backend", "data.dir",
          "train.keep_checkpoints"} < free


def test_whole_sections_are_told_as_one():
  assert may_change(EVALUATE)[:7] == (
      "data.source", "data.dir", "data.prompt", "data.label_words", "train.memory", "eval.", "mesh.")
  assert {"train.", "optimizer.", "seed.", "model.dtype"} < set(may_change(CONVERT))
  assert "model.router.order" in may_change(EVALUATE) and "model.router.k" not in may_change(EVALUATE)


def test_json_round_trip():
  config = default_config().unlock()
  config.model.moe_layers = (1, 3)
  config.data.mean_span = 3.0
  again = from_json(to_json(config))
  assert again.to_dict() == config.to_dict()
  assert again.is_locked


def test_json_keeps_keys_that_a_router_added():
  config = default_config().unlock()
  config.model.router.temperature = 2.0
  assert from_json(to_json(config)).model.router.temperature == 2.0


@pytest.mark.parametrize("section", ["router", "decoder"])
def test_an_older_run_keeps_what_an_argument_was_before_it_existed(section):
  """Losses of these routers were per group, and a config.json of then lacks `scope`."""
  config = default_config().unlock()
  router = config.model.router if section == "router" else config.model.decoder.router
  router.name = "noisy_top_k"
  assert from_json(to_json(config)).to_dict() == config.to_dict(), "one of now means the router's own default"
  then = json.loads(to_json(config))
  del then["model"]["router"]["scope"], then["model"]["decoder"]["router"]["scope"]
  router.scope = "group"
  assert from_json(json.dumps(then)).to_dict() == config.to_dict()
  router.name = "permuted"
  with router.unlocked():
    router.of = "hierarchical"
  then["model"] = config.model.to_dict()
  del then["model"]["router"]["scope"], then["model"]["decoder"]["router"]["scope"]
  assert from_json(json.dumps(then)).to_dict() == config.to_dict()


def test_dense_twin_has_no_router():
  config = default_config()
  twin = dense_twin(config)
  assert twin.model.num_experts == 0 and config.model.num_experts == 8  # the twin is a copy
  validate(twin)


def test_an_own_router_is_welcome():
  config = default_config().unlock()
  config.model.router.name = "package.module:Class"
  validate(config)
  config.model.router.name = "topk"
  with pytest.raises(UserError, match=r"did you mean 'top_k'. or give package.module:Class"):
    validate(config)


def test_a_decoder_has_the_encoders_routing_unless_it_sets_its_own():
  config = default_config()
  assert routing_field(config, "model.decoder.", "moe_every") == ("model.moe_every", 2)
  config.model.decoder.moe_every = 3
  assert routing_field(config, "model.decoder.", "moe_every") == ("model.decoder.moe_every", 3)
  assert sparse_indices(4, 2, ()) == (1, 3) and sparse_indices(4, 2, (2, 0)) == (0, 2)


def config_of(name, model):
  """Four layers, layers 1 and 3 sparse with 4 experts; an image has 4 x 4 patches and a class token."""
  c = default_config()
  c.model.update(dict(name=name, num_experts=4))
  c.data.objective = {"decoder": "causal", "seq2seq": "span_corruption", "vit": "softmax",
                      "limoe": "contrastive"}[name]
  if name in ("vit", "limoe"):
    c.data.image.size = 16
    c.model.update(dict(activation="gelu", pool="token" if name == "vit" else "mean", group_size=16))
  for key, value in model.items():
    if isinstance(value, dict):
      c.model[key].update(value)
    else:
      c.model[key] = value
  return c


@pytest.mark.parametrize("name", ["decoder", "seq2seq", "vit", "limoe"])
def test_each_architecture_is_welcome(name):
  validate(config_of(name, {}))


@pytest.mark.parametrize("words, name, model", [
    (("decoderr", "did you mean 'decoder'"), "decoder", dict(name="decoderr")),
    (("swigluu", "did you mean 'swiglu'"), "decoder", dict(activation="swigluu")),
    (("dtype", "bfloat16"), "decoder", dict(dtype="bfloat")),
    (("moe_layers", "layer 4", "0 to 3"), "decoder", dict(moe_layers=(1, 4))),
    (("moe_every=5", "num_layers=4"), "decoder", dict(moe_every=5)),
    (("k=5", "num_experts=4"), "decoder", dict(router=dict(k=5))),
    (("num_experts=-1",), "decoder", dict(num_experts=-1)),
    (("head_dim=7", "8"), "decoder", dict(head_dim=7)),
    (("num_heads=0",), "decoder", dict(num_heads=0)),
    (("dropout=1.0",), "decoder", dict(dropout=1.0)),
    (("model.decoder.num_experts", "model.num_experts"), "decoder", dict(decoder=dict(num_experts=2))),
    (("name='latentt'", "did you mean 'latent'"), "decoder", dict(attention=dict(name="latentt"))),
    (("num_kv_heads=3", "num_heads=2"), "decoder", dict(num_heads=2, attention=dict(num_kv_heads=3))),
    (("qk_norm='heads'", "did you mean 'head'"), "decoder", dict(attention=dict(qk_norm="heads"))),
    (("num_kv_heads", "model.moe_place=ffn"), "decoder", dict(
        moe_place="both", attention=dict(num_kv_heads=1))),
    (("model.attention.name", "model.moe_place=ffn"), "decoder", dict(
        moe_place="both", attention=dict(name="latent"))),
    (("model.moe_place='atention' is unknown; did you mean 'attention'",), "decoder", dict(
        moe_place="atention")),
    (("model.extra_ffn=True follows sparse FFNs", "choose moe_place='ffn'"), "decoder", dict(
        extra_ffn=True, moe_place="attention")),
    (("model.shared_dim=8 is set, but model.shared_experts=0; set that",), "decoder", dict(shared_dim=8)),
    (("model.router.name='smear' merges experts without biases, but model.ffn_bias=True",), "seq2seq", dict(
        router=dict(name="smear"), ffn_bias=True)),
    (("model.relative_bias.num_buckets=3, max_distance=128: T5's bias needs at least 4 buckets",), "seq2seq",
     dict(relative_bias=dict(num_buckets=3))),
    (("model.relative_bias.num_buckets=32, max_distance=16", "above 1/2 of"), "decoder", dict(
        layer_bias=True, relative_bias=dict(max_distance=16))),
    (("model.shared_gate=True is set, but model.shared_experts=0; set that",), "decoder", dict(
        shared_gate=True)),
    (("model.layer_bias=True is for model.name='decoder'; in a seq2seq",), "seq2seq", dict(layer_bias=True)),
    (("which a causal decoder refuses, and a vit has none; leave it",), "decoder", dict(depth_layers=(0,))),
    (("names layer 4, which is not among 0 to 3; name dense layers",), "seq2seq", dict(depth_layers=(4,))),
    (("names layer 1, which is sparse; name dense layers",), "seq2seq", dict(depth_layers=(1,))),
    (("model.depth_capacity=1.5 is out of range; choose above 0 to 1",), "seq2seq", dict(
        depth_layers=(0,), depth_capacity=1.5)),
    *[(("model.router.name='smear' is a layer of its own, without model.shared_experts",), "seq2seq", dict(
        router=dict(name="smear"), decoder=dict(num_experts=0), **more)) for more in (
            dict(shared_experts=1), dict(moe_place="attention"), dict(gating_dropout=dict(rate=0.1)))],
    (("model.patch_size=3 does not divide data.image.size=16; choose a patch of",), "vit", dict(
        patch_size=3)),
    (("model.activation='geglu', ", "choose gelu or relu, and ffn"), "vit", dict(activation="geglu")),
    (("model.moe_place='both'",), "vit", dict(moe_place="both")),
    (("model.router.name='smear' merges experts without biases, ",), "vit", dict(router=dict(name="smear"))),
    (("model.shared_experts=1 is set, but the MLPs of a vit and its experts are",), "vit", dict(
        shared_experts=1)),
    (("model.extra_ffn=True is set, ",), "vit", dict(extra_ffn=True)),
    (("model.pool='cls' is unknown; known: mean, token",), "vit", dict(pool="cls")),
    (("model.depth_layers=", "a vit has none"), "vit", dict(depth_layers=(0,))),
    (("model.pool='token' reads a class token, but a limoe compares means",), "limoe", dict(pool="token")),
    (("model.patch_size=3 does not divide data.image.size=16; ",), "limoe", dict(patch_size=3)),
    (("model.activation='geglu', ", ": a limoe has MLPs with biases, "), "limoe", dict(activation="geglu")),
    (("model.router.name='soft_moe' mixes ",), "limoe", dict(router=dict(name="soft_moe"))),
    (("model.router.name='smear' ", "a limoe's have some; "), "limoe", dict(router=dict(name="smear"))),
])
def test_a_mistake_is_named_with_its_way_out(words, name, model):
  with pytest.raises(UserError) as error:
    validate(config_of(name, model))
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value)
