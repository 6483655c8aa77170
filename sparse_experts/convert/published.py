"""The fields of a foreign config.json that `convert` reads: the type of each, and its default.

The defaults are those of transformers' configuration classes (5.24; 4.57 has the same): a field that a file
leaves out has the value that transformers would give it. Fields that change no output and no loss are left
out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from sparse_experts.config.key import INT32


def _is_whole(value: Any, least: int) -> bool:
  return type(value) is int and least <= value <= INT32  # what an axis of an array can have


def _is_list(value: Any, least: int) -> bool:
  return isinstance(value, list) and all(_is_whole(item, least) for item in value)


# Type, as messages say it -> whether a value is of it. A bool is no number, and 2.0 no whole one.
TYPES: dict[str, Callable[[Any], bool]] = {
    "a whole number from 1 to 2,147,483,647": lambda value: _is_whole(value, 1),
    "a whole number, 0 or more": lambda value: _is_whole(value, 0),
    "a number": lambda value: type(value) in (int, float) and math.isfinite(value),
    "true or false": lambda value: type(value) is bool,
    "a string": lambda value: isinstance(value, str),
    "a list of whole numbers": lambda value: _is_list(value, 0),
    "two whole numbers above 0": lambda value: _is_list(value, 1) and len(value) == 2,
    "an object": lambda value: isinstance(value, dict),
}


@dataclasses.dataclass(frozen=True)
class Field:
  """One field: its type, a key of TYPES; the default if it is absent; whether it may be null."""

  type: str
  default: Any
  null: bool = False

  @property
  def words(self) -> str:
    return self.type + " or null" * self.null

  def takes(self, value: Any) -> bool:
    return self.null if value is None else TYPES[self.type](value)


_count, _whole, _number, _flag, _text, _list, _two, _object = (
    functools.partial(Field, name) for name in TYPES)

Table = dict[str, Field]

ROPE: Table = {  # of rope_scaling and rope_parameters; theta's default stands beside them
    "rope_type": _text(None), "type": _text("default"), "rope_theta": _number(None),
    "factor": _number(None, True), "original_max_position_embeddings": _count(None),
    "beta_fast": _number(32.0, True), "beta_slow": _number(1.0, True), "mscale": _number(None, True),
    "mscale_all_dim": _number(None, True), "attention_factor": _number(None, True),
    "truncate": _flag(True), "partial_rotary_factor": _number(1.0)}

QUANTIZATION: Table = {
    "quant_method": _text("fp8"), "fmt": _text("e4m3"), "weight_block_size": _two([128, 128], True)}

_ANY: Table = {
    "vocab_size": _count(32_000), "tie_word_embeddings": _flag(False),
    "quantization_config": _object(None, True), "router_aux_loss_coef": _number(0.001)}

_DECODER: Table = _ANY | {
    "hidden_size": _count(2048), "num_hidden_layers": _count(24), "num_attention_heads": _count(16),
    "intermediate_size": _count(2048), "num_experts_per_tok": _count(8),
    "num_key_value_heads": _count(None, True), "head_dim": _count(None, True), "hidden_act": _text("silu"),
    "rms_norm_eps": _number(1e-6),
    "max_position_embeddings": _count(32_768), "rope_theta": _number(10_000.0),
    "rope_scaling": _object(None, True), "rope_parameters": _object(None, True),
    "partial_rotary_factor": _number(1.0)}

MIXTRAL: Table = _DECODER | {
    "hidden_size": _count(4096), "intermediate_size": _count(14_336), "num_hidden_layers": _count(32),
    "num_attention_heads": _count(32), "num_key_value_heads": _count(8, True), "rms_norm_eps": _number(1e-5),
    "max_position_embeddings": _count(131_072), "rope_theta": _number(1e6), "num_experts_per_tok": _count(2),
    "num_local_experts": _count(8), "router_jitter_noise": _number(0.0), "sliding_window": _count(None, True)}

OLMOE: Table = _DECODER | {
    "vocab_size": _count(50_304), "num_hidden_layers": _count(16), "rms_norm_eps": _number(1e-5),
    "max_position_embeddings": _count(4096), "num_experts": _count(64), "norm_topk_prob": _flag(False),
    "router_aux_loss_coef": _number(0.01), "clip_qkv": _number(None, True), "attention_bias": _flag(False)}

_QWEN: Table = _DECODER | {
    "vocab_size": _count(151_936), "decoder_sparse_step": _count(1), "mlp_only_layers": _list([], True),
    "norm_topk_prob": _flag(False), "use_sliding_window": _flag(False)}

QWEN2_MOE: Table = _QWEN | {
    "intermediate_size": _count(5632), "num_key_value_heads": _count(16), "num_experts_per_tok": _count(4),
    "num_experts": _count(60), "moe_intermediate_size": _count(1408),
    "shared_expert_intermediate_size": _count(5632), "qkv_bias": _flag(True)}

QWEN3_MOE: Table = _QWEN | {
    "intermediate_size": _count(6144), "num_attention_heads": _count(32), "num_key_value_heads": _count(4),
    "num_experts": _count(128), "moe_intermediate_size": _count(768), "attention_bias": _flag(False)}

DEEPSEEK_V3: Table = _DECODER | {
    "vocab_size": _count(129_280), "hidden_size": _count(7168), "intermediate_size": _count(18_432),
    "num_hidden_layers": _count(61), "num_attention_heads": _count(128),
    "num_key_value_heads": _count(128, True), "max_position_embeddings": _count(4096),
    "n_routed_experts": _count(256), "n_shared_experts": _count(1),
    "moe_intermediate_size": _count(2048), "routed_scaling_factor": _number(2.5), "kv_lora_rank": _count(512),
    "q_lora_rank": _count(1536, True), "qk_rope_head_dim": _count(64), "qk_nope_head_dim": _count(128),
    "v_head_dim": _count(128), "n_group": _count(8), "topk_group": _count(4),
    "first_k_dense_replace": _whole(3), "norm_topk_prob": _flag(True), "rope_interleave": _flag(True),
    "attention_bias": _flag(False),
    # Of DeepSeek's own files; transformers does not read them.
    "topk_method": _text("noaux_tc"), "scoring_func": _text("sigmoid"), "moe_layer_freq": _count(1)}
del DEEPSEEK_V3["router_aux_loss_coef"]  # which the class does not have

SWITCH: Table = _ANY | {
    "vocab_size": _count(32_128), "d_model": _count(768), "d_kv": _count(64), "d_ff": _count(2048),
    "num_layers": _count(12), "num_decoder_layers": _count(12, True), "num_heads": _count(12),
    "num_experts": _count(8), "num_sparse_encoder_layers": _whole(3), "num_sparse_decoder_layers": _whole(3),
    "encoder_sparse_step": _whole(None, True), "decoder_sparse_step": _whole(None, True),
    "expert_capacity": _count(64), "router_bias": _flag(False), "router_jitter_noise": _number(0.01),
    "router_z_loss_coef": _number(0.001), "relative_attention_num_buckets": _count(32),
    "relative_attention_max_distance": _count(128), "dropout_rate": _number(0.1),
    "layer_norm_epsilon": _number(1e-6), "dense_act_fn": _text("relu"), "tie_word_embeddings": _flag(True),
    "max_position_embeddings": _count(None, True)}  # T5 has no limit; a file may name one

# Another name for a field, as transformers reads and may write it.
ALIASES = {"mixtral": {"num_experts": "num_local_experts"}, "olmoe": {"num_local_experts": "num_experts"},
           "qwen3_moe": {"num_local_experts": "num_experts"},
           "deepseek_v3": {"num_local_experts": "n_routed_experts"},
           "switch_transformers": {"hidden_size": "d_model", "num_attention_heads": "num_heads",
                                   "num_hidden_layers": "num_layers"}}

PUBLISHED: dict[str, Table] = {
    "mixtral": MIXTRAL, "olmoe": OLMOE, "qwen2_moe": QWEN2_MOE, "qwen3_moe": QWEN3_MOE,
    "deepseek_v3": DEEPSEEK_V3, "switch_transformers": SWITCH}
