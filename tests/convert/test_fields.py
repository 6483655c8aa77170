"""config.json is read by the rule of the library that wrote it: types, defaults, fields with several places.

`defaults.json` holds what transformers' configuration classes say: make_defaults.py.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.convert.eight_bits import Rule
from sparse_experts.convert.files import Folder
from sparse_experts.convert.layouts import LAYOUTS, fields_of, get_layout
from sparse_experts.convert.published import ALIASES, PUBLISHED, QUANTIZATION, ROPE
from sparse_experts.convert.read import make_config
from sparse_experts.convert.write import foreign_config
from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.models import build
from sparse_experts.tasks import task_of
from sparse_experts.training import objectives
from sparse_experts.validation import validate
from tests.convert.checkpoints import save

DEFAULTS = json.loads((pathlib.Path(__file__).parent / "defaults.json").read_text())
# Fields that are no attributes of the classes: None is what the code that reads them takes for absent.
ELSEWHERE = {
    "head_dim": None, "max_position_embeddings": None, "rope_scaling": None, "quantization_config": None,
    "partial_rotary_factor": 1.0, "encoder_sparse_step": None, "decoder_sparse_step": None,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
FIELDS = [(family, name) for family, table in PUBLISHED.items() for name in table]
WRONG = ["8", "", 2.5, -1, 0, 10**20, float("nan"), float("inf"), None, True, [1], ["a"], [True], {}]


def read(family, **fields):
  layout = get_layout(family, "")
  return layout.read(fields_of(layout, fields, "config.json"))


def config_of(family, **fields):
  """(layout, config of a run) of a config.json."""
  layout = get_layout(family, "")
  hf = fields_of(layout, fields, "config.json")
  return layout, make_config(layout.read(hf), hf, make_tokenizer(f"vocabulary:{hf('vocab_size')}"))


@pytest.mark.parametrize("family, name", FIELDS)
def test_an_absent_field_has_the_default_of_the_published_class(family, name):
  published = DEFAULTS[family]
  default = PUBLISHED[family][name].default
  expected = published[name] if name in published else ELSEWHERE[name]
  if name == "mlp_only_layers":  # the class turns null into []
    expected = []
  assert default == expected and isinstance(default, bool) == isinstance(expected, bool)
  assert read(family) == read(family, **({} if default is None else {name: default}))


@pytest.mark.parametrize("family, name", FIELDS)
def test_a_value_of_another_type_is_named_in_one_line(family, name):
  refused = 0
  for value in WRONG:
    if not PUBLISHED[family][name].takes(value):
      with pytest.raises(UserError) as error:
        read(family, **{name: value})
      line = str(error.value)
      assert line.startswith(f"config.json: {name}={value!r} is not ") and line.endswith("; restore the file")
      assert PUBLISHED[family][name].type in line
      refused += 1
  assert refused >= 6


@pytest.mark.parametrize("section, table", [("rope_scaling", ROPE), ("quantization_config", QUANTIZATION)])
def test_so_is_a_value_in_an_object(section, table):
  layout = get_layout("mixtral", "")
  for name, field in table.items():
    for value in WRONG:
      if not field.takes(value):
        with pytest.raises(UserError, match=f"config.json: {section}: {name}=.* is not {field.type}"):
          hf = fields_of(layout, {section: {"factor": 2.0, name: value}}, "config.json")
          hf.rope() if section == "rope_scaling" else hf.scales()


def test_types_tell_what_python_takes_for_equal_apart():
  takes = lambda family, name, value: PUBLISHED[family][name].takes(value)
  assert takes("mixtral", "rope_theta", 10_000) and takes("mixtral", "rope_theta", 1e4)
  for name, value in (("hidden_size", 2.0), ("hidden_size", True), ("rms_norm_eps", False),
                      ("hidden_size", None), ("tie_word_embeddings", 0), ("vocab_size", 2**31)):
    assert not takes("mixtral", name, value)
  assert takes("mixtral", "head_dim", None) and takes("deepseek_v3", "first_k_dense_replace", 0)


@pytest.mark.parametrize("family", sorted(ALIASES))
def test_a_field_may_have_another_name(family):
  for alias, name in ALIASES[family].items():
    assert read(family, **{alias: 12}) == read(family, **{name: 12})
    with pytest.raises(UserError, match=f"{name}=12, but {alias}=16 is another name of it"):
      read(family, **{alias: 16, name: 12})


def test_null_is_not_absent():
  """DeepSeek-V3's queries are low-rank unless its file says null; heads of keys are the class's number."""
  key = "attention.q_rank"
  assert read("deepseek_v3")[key] == 1536 and read("deepseek_v3", q_lora_rank=None)[key] is None
  heads = "attention.num_kv_heads"
  assert read("mixtral")[heads] == 8 and read("mixtral", num_key_value_heads=None)[heads] is None
  assert read("olmoe")[heads] is None and read("qwen3_moe")[heads] == 4
  assert (read("deepseek_v3")["router.nodes"], read("deepseek_v3")["router.nodes_per_token"]) == (8, 4)


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024)


@pytest.mark.parametrize("fields, expected", [
    ({}, {"rope.theta": 1e6}),
    (dict(rope_theta=5e4), {"rope.theta": 5e4}),
    (dict(rope_scaling=dict(rope_type="default", rope_theta=5e4)), {"rope.theta": 5e4}),
    (dict(rope_scaling=dict(rope_theta=5e4), rope_theta=7.0), {"rope.theta": 5e4}),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=5e4)), {"rope.theta": 5e4}),
    # An object in the old place counts instead of the new one, not beside it.
    (dict(rope_scaling=YARN, rope_parameters=dict(rope_type="default", rope_theta=5e4)),
     {"rope.theta": 1e6, "rope.factor": 4.0, "rope.original_length": 1024, "rope.mscale": 0.0}),
    (dict(rope_scaling=dict(rope_theta=3e3), rope_parameters=YARN), {"rope.theta": 3e3}),
    (dict(rope_scaling={}, rope_parameters=YARN), {"rope.theta": 1e6, "rope.factor": 4.0}),
    (dict(rope_scaling=dict(type="yarn", factor=4), max_position_embeddings=64), {
        "rope.factor": 4.0, "rope.original_length": 64, "rope.beta_fast": 32.0, "rope.beta_slow": 1.0}),
    (dict(rope_scaling=YARN | dict(factor=None, mscale_all_dim=0.7), max_position_embeddings=2048), {
        "rope.factor": 2.0, "rope.mscale": 0.0, "rope.mscale_all_dim": 0.7}),
])
def test_rotary_positions_are_where_transformers_looks(fields, expected):
  model = read("mixtral", **fields)
  assert {key: model[key] for key in expected} == expected
  assert ("rope.factor" in model) == ("rope.factor" in expected)


@pytest.mark.parametrize("fields, words", [
    (dict(rope_parameters={"full_attention": YARN}), "full_attention: positions of each kind of layer"),
    (dict(rope_scaling=dict(rope_type="llama3")), "rope type 'llama3' is not supported"),
    (dict(rope_scaling=dict(rope_type="yarn")), "rope_scaling: YaRN needs a factor"),
    (dict(rope_scaling=YARN | dict(attention_factor=1.2)), "attention_factor=1.2 is not supported"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
    (dict(rope_scaling=dict(partial_rotary_factor=0.5)), "rope_scaling: partial_rotary_factor=0.5"),
    (dict(hidden_act="relu"), "hidden_act='relu' is not supported, only silu, gelu_new, gelu are"),
    (dict(attention_bias=True), "attention_bias=True is not supported"),
])
def test_what_is_not_supported_is_named(fields, words):
  with pytest.raises(UserError, match=words):
    read("qwen3_moe", **fields)


@pytest.mark.parametrize("theirs, gated, plain", [
    ("silu", "swiglu", None), ("swish", "swiglu", None), ("gelu", "geglu_exact", "gelu_exact"),
    ("gelu_new", "geglu", "gelu"), ("gelu_pytorch_tanh", "geglu", "gelu"), ("relu", None, "relu")])
def test_activations_mean_what_they_mean_there(theirs, gated, plain):
  """`gelu` is the exact one in transformers, tanh's approximation here."""
  for family, field, ours in (
      ("mixtral", "hidden_act", gated), ("switch_transformers", "dense_act_fn", plain)):
    if ours is None:
      with pytest.raises(UserError, match=f"{field}='{theirs}' is not supported"):
        read(family, **{field: theirs})
    else:
      assert read(family, **{field: theirs})["activation"] == ours


@pytest.mark.parametrize("family, ours, theirs", [
    ("mixtral", {"activation": "geglu_exact"}, {"hidden_act": "gelu"}),
    ("olmoe", {"activation": "geglu"}, {"hidden_act": "gelu_new"}),
    ("switch_transformers", {"activation": "gelu_exact"}, {"dense_act_fn": "gelu"}),
    ("switch_transformers", {"relative_bias.num_buckets": 16, "relative_bias.max_distance": 40},
     {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 40}),
    ("qwen2_moe", {"shared_experts": 1, "shared_dim": 100, "expert_dim": 1408},
     {"shared_expert_intermediate_size": 100}),
    ("qwen2_moe", {"shared_experts": 2, "shared_dim": None, "expert_dim": 64},
     {"shared_expert_intermediate_size": 128}),
    ("deepseek_v3", {"shared_experts": 1, "shared_dim": 128, "expert_dim": 64}, {"n_shared_experts": 2}),
])
def test_conventions_go_both_ways(family, ours, theirs):
  layout, config = config_of(family)
  with config.unlocked():
    config.model.update_from_flattened_dict(ours)
  tokenizer = make_tokenizer(f"vocabulary:{PUBLISHED[family]['vocab_size'].default}")
  written = foreign_config(layout, config, tokenizer, "float32")
  assert {name: written[name] for name in theirs} == theirs
  model = read(family, **{name: value for name, value in written.items() if name in PUBLISHED[family]})
  assert all(model[key] == value for key, value in ours.items() if not key.startswith("shared"))


@pytest.mark.parametrize("family, ours, words", [
    ("deepseek_v3", {"shared_dim": 100, "shared_experts": 1}, "model.shared_dim=100, only 2048"),
    ("mixtral", {"ffn_bias": True}, "model.ffn_bias=True, only False"),
    ("mixtral", {"shared_experts": 2}, "model.shared_dim=28672, only 0"),
    ("mixtral", {"activation": "relu"}, "model.activation='relu', only 'swiglu'"),
])
def test_what_a_layout_cannot_hold_is_named(family, ours, words):
  layout, config = config_of(family)
  with config.unlocked():
    config.model.update_from_flattened_dict(ours)
  tokenizer = make_tokenizer(f"vocabulary:{PUBLISHED[family]['vocab_size'].default}")
  with pytest.raises(UserError, match=words):
    foreign_config(layout, config, tokenizer, "float32")


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_a_config_comes_back_with_its_coefficients(family):
  """Those of the losses as well, which no output depends on; absent, they are the family's."""
  for coefficient in (None, 0.02):
    given = {name: coefficient for name in ("router_aux_loss_coef", "router_z_loss_coef")
             if coefficient and name in PUBLISHED[family]}
    layout = get_layout(family, "")
    hf = fields_of(layout, given, "config.json")
    tokenizer = make_tokenizer(f"vocabulary:{hf('vocab_size')}")
    config = make_config(layout.read(hf), hf, tokenizer)
    written = foreign_config(layout, config, tokenizer, "float32")
    for name in (*given, "router_aux_loss_coef", "router_jitter_noise", "max_position_embeddings",
                 "expert_capacity"):
      if name in PUBLISHED[family] and hf(name) is not None:
        assert written[name] == hf(name), name


def test_slots_and_losses_are_those_of_transformers():
  """`expert_capacity` slots of a sequence; the balance loss of all layers of a stack at once."""
  _, config = config_of("switch_transformers", expert_capacity=7, num_layers=4, num_decoder_layers=4,
                        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2)
  validate(config)
  tokenizer = make_tokenizer(config.data.tokenizer)
  model, lengths = build(config, tokenizer.vocab_size), task_of(config).row_lengths(tokenizer)
  for name, layer in model.sparse_layers.items():
    assert layer.capacity == 7
    assert layer.group_size == lengths["encoder" if name.startswith("encoder") else "targets"]
  objectives.check_pooled(model)
  assert set(objectives.layer_losses(model, config).values()) == {"pooled"}


def test_a_coefficient_of_another_count_is_written_for_theirs():
  """multi_hot counts each of k choices, `assignments` their mean."""
  layout, tokenizer = get_layout("mixtral", ""), make_tokenizer("vocabulary:32000")
  config = make_config(read("mixtral"), fields_of(layout, {}, ""), tokenizer)
  config.unlock().model.router.update(dict(balance_count="assignments", load_balance_weight=0.04))
  assert foreign_config(layout, config, tokenizer, "float32")["router_aux_loss_coef"] == 0.02


def eight_bits(folder, scale, rows=24, columns=40):
  values = np.random.default_rng(0).standard_normal((rows, columns)).astype(jnp.dtype("float8_e4m3fn"))
  arrays = {"w": values} | ({} if scale is None else {"w_scale_inv": np.asarray(scale, np.float32)})
  return values.astype(np.float32), Folder(str(save(folder, arrays, {})))


@pytest.mark.parametrize("block, shape, repeat", [
    ([128, 128], (1, 1), (24, 40)), ([16, 16], (2, 3), (16, 16)), ([1, 40], (24, 1), (1, 40)),
    ([1, 128], (24, 1), (1, 40)), ([16, 8], (2, 5), (16, 8)), (None, (), (24, 40)), (None, (1,), (24, 40)),
    (None, (24, 1), (1, 40)), ([16, 16], (24, 1), (1, 40)), ([16, 16], (), (24, 40)),
    ("absent", (1, 1), (24, 40)), ("absent", (24, 1), (1, 40)),
])
def test_eight_bits_are_scaled_by_the_blocks_that_config_json_names(block, shape, repeat, tmp_path):
  """Without them, by blocks of 128. Scales of rows, and one of all, are seen by their shape."""
  scale = 1 + np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
  plain, folder = eight_bits(tmp_path / "hf", scale)
  given = {} if block == "absent" else dict(quantization_config=dict(weight_block_size=block))
  folder.scale_by(fields_of(get_layout("deepseek_v3", ""), given, "config.json").scales())
  whole = scale.reshape((1,) * (2 - scale.ndim) + scale.shape)
  np.testing.assert_array_equal(
      folder.read("w"), plain * np.repeat(np.repeat(whole, repeat[0], 0), repeat[1], 1)[:24, :40])
  assert set(folder.tensors) == {"w"}


@pytest.mark.parametrize("block, shape", [
    ([128, 128], (2, 3)), ([16, 16], (1, 1)), ([16, 16], (3, 2)), (None, (2, 3)), (None, (40,))])
def test_scales_of_another_shape_are_refused(block, shape, tmp_path):
  _, folder = eight_bits(tmp_path / "hf", np.ones(shape))
  with pytest.raises(UserError, match=r"w_scale_inv is float32 .* of a matrix \[24, 40\] needs a float \["):
    folder.scale_by(Rule(block and tuple(block), stated=True))


def test_eight_bits_without_scales(tmp_path):
  """Refused where config.json says they are quantised; otherwise they are the values themselves."""
  plain, folder = eight_bits(tmp_path / "hf", None)
  folder.scale_by(Rule())
  np.testing.assert_array_equal(folder.read("w").astype(np.float32), plain)
  with pytest.raises(UserError, match="w has 8 bits, but w_scale_inv is not there"):
    folder.scale_by(Rule(stated=True))
  given = dict(quantization_config=dict(quant_method="gptq"))
  with pytest.raises(UserError, match="config: quant_method='gptq' is not supported, only 'fp8'"):
    fields_of(get_layout("mixtral", ""), given, "config.json").scales()


def test_eight_bits_of_all_experts_together(tmp_path):
  values = np.ones((2, 4, 6), jnp.dtype("float8_e4m3fn"))
  scale = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
  folder = Folder(str(save(tmp_path / "hf", {"w": values, "w_scale_inv": scale}, {})))
  folder.scale_by(Rule((2, 3), True))
  np.testing.assert_array_equal(folder.read("w"), np.repeat(np.repeat(scale, 2, 1), 3, 2))
