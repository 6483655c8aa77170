"""The keys of `model`: the architecture, its sparse layers, and the router."""

import dataclasses

from sparse_experts.config.key import CONVERT, EVALUATE, LOG, SPEED, TRAINING, Key
from sparse_experts.config.routers import LAYERS, ROUTERS

_ACTIVATIONS = ("relu", "gelu", "gelu_exact", "geglu", "geglu_exact", "swiglu")

_ARCHITECTURE = (
    Key("model.name", "decoder", "the architecture", choices=("decoder", "seq2seq", "vit", "limoe")),
    Key("model.num_layers", 4, "layers of each stack", within="1 or more", most=2048),
    Key("model.embed_dim", 128, "width of a token's vector", within="1 or more"),
    Key("model.mlp_dim", 256, "hidden width of dense FFNs", within="1 or more"),
    Key("model.num_heads", 4, "attention heads", within="1 or more"),
    Key("model.head_dim", 32, "width of one attention head", within="1 or more"),
    Key("model.attention.name", "multi_head", "the attention; latent is DeepSeek-V2's",
        choices=("multi_head", "latent")),
    Key("model.attention.num_kv_heads", int, "multi_head: heads of keys and values; unset: num_heads",
        within="1 or more"),
    Key("model.attention.qk_norm", str, "multi_head: RMSNorm of queries and keys over all heads together "
        "(whole) or each head (head); unset: none", choices=("none", "whole", "head")),
    Key("model.attention.bias", bool, "multi_head: biases of queries, keys and values; unset: False"),
    Key("model.attention.q_rank", int, "latent: width of the vector that queries are made from; unset: they "
        "are made from the layer's input", within="1 or more"),
    Key("model.attention.kv_rank", int, "latent: width of the vector that keys and values are made from; "
        "unset: 512", within="1 or more"),
    Key("model.attention.rope_dim", int, "latent: how many of head_dim are rotated; unset: 64",
        within="2 or more"),
    Key("model.attention.value_dim", int, "latent: width of one head's value; unset: 128",
        within="1 or more"),
    Key("model.rope.theta", 10_000.0, "rotary positions of decoders: the base of the wavelengths",
        within="1 or more"),
    Key("model.rope.factor", 1.0, "YaRN: how much longer texts are than original_length; 1: no YaRN",
        within="1 or more"),
    Key("model.rope.original_length", 4096, "YaRN: length that was trained before it is extended",
        within="1 or more"),
    Key("model.rope.beta_fast", 32.0, "YaRN: dimensions that turn more often than this within "
        "original_length keep their wavelength", within="0 or more"),
    Key("model.rope.beta_slow", 1.0, "YaRN: dimensions that turn less often than this are stretched by "
        "factor", within="0 or more"),
    Key("model.rope.mscale", 1.0, "YaRN: numerator of DeepSeek's scale of what is rotated, where both "
        "mscale keys are above 0", within="0 or more"),
    Key("model.rope.mscale_all_dim", 0.0, "YaRN: its denominator, by which latent attention scales its "
        "scores too; 0: YaRN's own scale", within="0 or more"),
    Key("model.context_length", int, "decoder, seq2seq: most tokens of a prompt that `sample` reads; unset: "
        "data.length. A converted model has its own", LOG, within="2 or more"),
    Key("model.norm_eps", 1e-6, "added to the mean square in every RMSNorm", within="0 or more"),
    Key("model.layer_bias", False, "decoder: T5's relative position bias, one table per layer, instead of "
        "rotary positions"),
    Key("model.relative_bias.num_buckets", 32, "T5's relative position bias: rows of its table, half of them "
        "for each direction in an encoder", within="2 or more"),
    Key("model.relative_bias.max_distance", 128, "T5's relative position bias: distance from which all keys "
        "share a row", within="2 or more"),
    Key("model.activation", "swiglu", "activation of the FFNs; gelu and geglu are tanh's approximation, "
        "gelu_exact and geglu_exact the normal distribution's", choices=_ACTIVATIONS),
    Key("model.ffn_bias", False, "decoder, seq2seq: biases in all FFNs, of experts and gates too; a vit and "
        "a limoe always have them"),
    Key("model.tied_head", True, "the output head shares its weights with the embedding"),
    Key("model.dropout", 0.0, "dropout rate", TRAINING, within="from 0 to below 1"),
    Key("model.dtype", "float32", "type of activations; parameters and router stay float32", TRAINING,
        choices=("float32", "bfloat16"), also=(CONVERT,)),
    Key("model.remat", False, "recompute each layer in the backward pass: less memory, more time, other "
        "rounding", TRAINING, also=(CONVERT,)),
    Key("model.patch_size", 4, "vit, limoe: pixels along an edge of a patch", within="1 or more"),
    Key("model.pool", "token", "vit: what the head reads of the last layer, a class token or the mean over "
        "patches; limoe: mean only", choices=("token", "mean")),
    Key("model.representation_dim", 0, "vit: width of a tanh layer before the head, 0: none; limoe: width of "
        "the vectors that are compared, 0: embed_dim", within="0 or more"),
    Key("model.head_bias", 0.0, "vit: initial bias of the head", within="-1000 or more"),
)

_SPARSE = (
    Key("model.num_experts", 8, "experts of a sparse layer; 0: a dense model, without router",
        within="0 or more"),
    Key("model.moe_every", 2, "n: layers n-1, 2n-1, ... are sparse", within="1 or more"),
    Key("model.moe_layers", (), "which layers are sparse, instead of moe_every"),
    Key("model.depth_layers", (), "dense encoder layers that are Mixture-of-Depths blocks: only "
        "depth_capacity of the tokens pass through"),
    Key("model.depth_capacity", 0.125, "share of a row's tokens, those with the largest scores, that pass "
        "through a Mixture-of-Depths block", within="above 0 to 1"),
    Key("model.moe_place", "ffn", "what is sparse in a sparse layer: the FFN, the attention's queries, keys "
        "and values, or both", choices=("ffn", "attention", "both")),
    Key("model.moe_heads", 1, "sub-tokens that a sparse FFN cuts each token into, of width embed_dim / "
        "moe_heads, and routes one by one (MH-MoE); 1: whole tokens", within="1 or more"),
    Key("model.moe_projections", "both", "moe_heads above 1: the dense projections around it, before the "
        "cut (head), after the experts (merge), or both", choices=("both", "head", "merge", "none")),
    Key("model.expert_dim", int, "hidden width of one expert; unset: mlp_dim", within="1 or more"),
    Key("model.expert_activation", str, "activation of the experts; unset: activation", choices=_ACTIVATIONS),
    Key("model.expert_dropout", 0.0, "dropout rate inside experts", TRAINING, within="from 0 to below 1"),
    Key("model.expert_init_scale", 0.1, "variance scale of the experts' initial weights (Switch, section "
        "2.4)", TRAINING, within="0 or more"),
    Key("model.expert_weights", "float32", "numbers that the experts of sparse FFNs multiply by; ternary: "
        "BitNet b1.58's BitLinear, without biases, its activations quantized too",
        choices=("float32", "ternary")),
    Key("model.ternary.norm", str, "ternary experts: norm, without weights, of each product's input; unset: "
        "rms", choices=("rms", "layer", "none")),
    Key("model.ternary.activation_bits", int, "ternary experts: bits of each product's input; unset: 8",
        within="2 to 16"),
    Key("model.multiplicative_bias", False, "multiply each expert's hidden units by a learnt vector "
        "(ST-MoE)"),
    Key("model.extra_ffn", False, "a dense FFN with its own norm and residual follows each sparse FFN "
        "(ST-MoE)"),
    Key("model.shared_experts", 0, "FFNs of an expert's width that every token passes through as well "
        "(DeepSeekMoE)", within="0 or more"),
    Key("model.shared_dim", int, "hidden width of all shared experts together; unset: shared_experts times "
        "an expert's", within="1 or more"),
    Key("model.shared_gate", False, "multiply the shared experts' sum by sigmoid(x w) (Qwen2-MoE)"),
)

# Other routers' arguments may be set besides: `--config.model.router.KEY=VALUE`, or in a config file
# `with config.model.router.unlocked(): ...`. Unset, an argument is the router's own default, so that a
# router which lacks it can be named; the meanings give `top_k`'s.
_ROUTER = (
    Key("model.router.name", "top_k", "the router, or a layer that mixes tokens without one; `describe "
        "--routers` lists them", choices=(*ROUTERS, *LAYERS), open_to="package.module:Class"),
    Key("model.router.k", int, "experts per token; unset: 1", within="1 or more"),
    Key("model.router.jitter", float, "multiply the router's input by U(1 - jitter, 1 + jitter) in training; "
        "unset: 0", TRAINING, within="from 0 to below 1"),
    Key("model.router.input_dropout", float, "dropout rate of the router's input; unset: 0", TRAINING,
        within="from 0 to below 1"),
    Key("model.router.choose", str, "in training, take the most probable experts or sample them; unset: "
        "largest", TRAINING, choices=("largest", "sampled")),
    Key("model.router.gate", str, "router probabilities as they are, or divided by the sum over the chosen "
        "experts, or over those that kept the token; unset: raw",
        choices=("raw", "renormalized", "renormalized_after_drops")),
    Key("model.router.order", str, "who claims a slot first: all first choices, all choices of a token, or "
        "the tokens of highest probability; unset: choice", TRAINING,
        choices=("choice", "token", "batch_priority"), also=(EVALUATE,)),
    Key("model.router.skip_threshold", float, "in training, use choices after the first with probability "
        "gate / threshold; unset: always", TRAINING, within="0 or more"),
    Key("model.router.bias", bool, "add a learnt number per expert to the logits; unset: no"),
    Key("model.router.balance_count", str, "what the load-balancing loss counts: first choices, those of "
        "them that got a slot, all choices (multi_hot), or all divided by k (assignments); unset: first",
        TRAINING, choices=("first", "first_kept", "multi_hot", "assignments")),
    Key("model.router.loss_padding", str, "leave padding out of the losses, count it in their "
        "denominators as Flaxformer, or as any token, as Hugging Face; unset: excluded", TRAINING,
        choices=("excluded", "flaxformer", "hugging_face")),
    Key("model.router.scope", str, "over what losses are computed that are nonlinear in sums over tokens: "
        "each routing group, or the whole batch; unset: the router's own", TRAINING,
        choices=("group", "batch")),
    Key("model.router.load_balance_weight", float, "coefficient of the load-balancing loss; unset: 0.01",
        TRAINING, within="0 or more"),
    Key("model.router.z_weight", float, "coefficient of the router z-loss; unset: 0", TRAINING,
        within="0 or more"),
)

_EXECUTION = (
    Key("model.gating_dropout.rate", 0.0, "probability, per step and sparse layer, that tokens stay on their "
        "machine (Gating Dropout)", TRAINING, within="0 or more"),
    Key("model.gating_dropout.machines", 1, "machines that the experts are spread over, for the drop",
        TRAINING, within="1 or more"),
    Key("model.gating_dropout.replicas", 1, "parts of the batch, each with its own set of machines", TRAINING,
        within="1 or more"),
    Key("model.gating_dropout.skip_experts", False, "when tokens stay, no expert sees them", TRAINING),
    Key("model.capacity_factor", float, "slots of an expert in training, relative to an even load; 0: "
        "dropless; unset: the router's own, see `describe --routers`", TRAINING, within="0 or more",
        most=2**20, also=(EVALUATE,)),
    Key("model.eval_capacity_factor", float, "the capacity factor in evaluation; unset: the router's own",
        TRAINING, within="0 or more", most=2**20, also=(EVALUATE,)),
    Key("model.capacity_rule", str, "whose formula makes slots of the capacity factor (moe/capacity.py); "
        "unset: the router's own", TRAINING, also=(EVALUATE,), choices=(
            "flaxformer", "lingvo", "maxtext", "megablocks", "mesh", "vmoe", "vmoe_paper")),
    Key("model.min_capacity", int, "fewest slots of an expert; unset: the rule's", TRAINING,
        within="0 or more", also=(EVALUATE,)),
    Key("model.capacity_slots", int, "slots of an expert and group as a number, in training and evaluation, "
        "instead of a factor (Hugging Face's expert_capacity)", TRAINING, within="1 or more",
        also=(EVALUATE,)),
    Key("model.group_size", 512, "tokens that are routed together and share an expert's slots", TRAINING,
        within="1 or more", also=(EVALUATE, CONVERT)),
    Key("model.dispatch", "ragged", "how tokens reach their experts and come back", SPEED,
        choices=("einsum", "scatter", "ragged"), also=(EVALUATE, CONVERT)),
    Key("model.backend", str, "what computes grouped products; unset: the platform's fastest", SPEED,
        choices=("slots", "ragged_dot", "tokamax")),
    Key("model.exchange_rows_factor", float, "rows that a device has room for in a dropless exchange, over "
        "those that it sends; what does not fit travels in further rounds; unset: the worst case", SPEED,
        within="0 or more", most=2**20, also=(EVALUATE, CONVERT)),
)

# What makes slots of the size of a group; `capacity_slots` stands instead of all of them.
FACTOR_KEYS = ("capacity_factor", "eval_capacity_factor", "capacity_rule", "min_capacity")
_DECODER = ("num_experts", "moe_every", *FACTOR_KEYS, "capacity_slots", "group_size", "dispatch",
            "moe_layers")  # and the router's


def _of_decoder(keys: tuple[Key, ...]) -> tuple[Key, ...]:
  """The same keys for an encoder-decoder's decoder; unset means the encoder's."""
  return tuple(dataclasses.replace(
      key, name=key.name.replace("model.", "model.decoder.", 1), default=key.type,
      meaning=f"seq2seq: {key.name} of the decoder; unset: the encoder's") for key in keys)


_BY_NAME = {key.name: key for key in (*_SPARSE, *_EXECUTION)}
KEYS = (*_ARCHITECTURE, *_SPARSE, *_ROUTER, *_EXECUTION,
        *_of_decoder(tuple(_BY_NAME[f"model.{name}"] for name in _DECODER)), *_of_decoder(_ROUTER))
