"""The default configuration: every key a run can set, with what it means. Config files start from it.

A key has the same spelling as the constructor argument it feeds. `None` in a placeholder means "not
set": the default of the thing it feeds, or, under `model.decoder`, the same as the encoder's.
"""

from ml_collections import ConfigDict, config_dict

placeholder = config_dict.placeholder
SEEDS = ("init", "data", "noise")  # initial values; order and masked spans; jitter, dropout and the like


def _router() -> ConfigDict:
  """Arguments of the router. None: its own default, so a router that lacks an argument can be named.

  Comments tell `top_k`'s defaults (`moe/routers/top_k.py`). Other routers' arguments may be added:
  `--config.model.router.KEY=VALUE`, or in a config file `with config.model.router.unlocked(): ...`.
  """
  c = ConfigDict()
  c.name = "top_k"  # a key of ROUTERS, or package.module:Class
  c.k = placeholder(int)  # experts per token; 1
  c.jitter = placeholder(float)  # multiplies the router's input by U(1 - jitter, 1 + jitter) in training; 0
  c.input_dropout = placeholder(float)  # share of the router's input that is dropped in training; 0
  c.choose = placeholder(str)  # largest (default) | sampled: which experts, in training
  c.gate = placeholder(str)  # raw (default) | renormalized | renormalized_after_drops
  c.order = placeholder(str)  # choice (default) | token | batch_priority: who claims a slot first
  c.skip_threshold = placeholder(float)  # further experts: with probability gate / threshold; 0: always
  c.balance_count = placeholder(str)  # first (default) | multi_hot | assignments: in the balance loss
  c.load_balance_weight = placeholder(float)  # 0.01
  c.z_weight = placeholder(float)  # 0
  return c


def _decoder_overrides() -> ConfigDict:
  """Routing fields of an encoder-decoder's decoder; unset means the encoder's."""
  c = ConfigDict()
  for name, kind in dict(
      num_experts=int, moe_every=int, capacity_factor=float, eval_capacity_factor=float, group_size=int,
      dispatch=str, capacity_rule=str, min_capacity=int).items():
    c[name] = placeholder(kind)
  c.moe_layers = placeholder(tuple)
  c.router = _router()
  c.router.name = placeholder(str)
  return c


def _image() -> ConfigDict:
  """How images are read; from `crop_area` on, in training only."""
  c = ConfigDict()
  c.size = 8  # pixels along an edge, after resizing and cropping to a square
  c.classes = placeholder(int)  # rows of the head; None: the source's classes
  c.skip_unreadable = False  # leave out images that cannot be read, and say how many, instead of stopping
  c.crop_area = 1.0  # smallest share of the area that a random crop keeps, at 3/4 to 4/3; 1: no crop
  c.shift = 0  # moves the image by up to so many pixels each way, its edges repeated
  c.flip = False  # left and right, of every second image
  c.randaugment_layers = 0  # RandAugment: operations in a row
  c.randaugment_magnitude = 10.0  # their strength, 0 to 30
  c.mixup = 0.0  # blends with another image, the shares drawn from Beta(mixup, mixup); 0: none
  return c


def default_config() -> ConfigDict:
  """A small decoder-only language model with Switch routing on the embedded text; locked."""
  c = ConfigDict()
  c.init_from = ""  # DIR[@step]: start from another run's weights
  # Which of them, by the names that `describe --parameters` lists: globs with commas between them, one with
  # `-` in front takes names out ('*,-*/ffn/*'). The rest starts fresh.
  c.init_take = "*"
  c.init_upcycle = False  # experts are copies of the other run's dense FFNs, and their routers start fresh
  # fresh | step: goes on counting from the other run's step, which rates and data follow | moments: besides
  c.init_optimizer = "fresh"  # with the optimizer's moments of what is taken (training/init_optimizer.py)

  c.given = ConfigDict()  # set by `train`: classes of the instances it was given in place of these
  c.given.router = placeholder(str)
  c.given.data = placeholder(str)

  c.model = m = ConfigDict()
  m.name = "decoder"  # decoder | seq2seq | vit | limoe
  m.num_layers = 4  # of each stack
  m.embed_dim = 128
  m.mlp_dim = 256  # hidden width of dense FFNs
  m.num_heads = 4
  m.head_dim = 32
  # Arguments of the attention. None: its own default, or not one of its arguments (models/attention.py).
  m.attention = a = ConfigDict()
  a.name = "multi_head"  # multi_head | latent (DeepSeek-V2's, models/latent_attention.py)
  a.num_kv_heads = placeholder(int)  # multi_head: heads of keys and values; as many as num_heads
  a.qk_norm = placeholder(str)  # multi_head: none (default) | whole | head: RMSNorm of queries and keys
  a.bias = placeholder(bool)  # multi_head: of queries, keys and values; False
  a.q_rank = placeholder(int)  # latent: queries come from a vector of this width; straight from x
  a.kv_rank = placeholder(int)  # latent: width of what keys and values come from; 512
  a.rope_dim = placeholder(int)  # latent: how many of head_dim are rotated; 64
  a.value_dim = placeholder(int)  # latent: width of a value; 128
  # Rotary positions of decoders; factor above 1: YaRN (models/rope.py).
  m.rope = ConfigDict(dict(theta=10_000.0, factor=1.0, original_length=4096, beta_fast=32.0, beta_slow=1.0,
                           mscale=1.0, mscale_all_dim=0.0))
  m.norm_eps = 1e-6  # added to the mean square in every RMSNorm
  m.layer_bias = False  # a decoder's positions: T5's relative bias, one table a layer, in place of rotation
  m.activation = "swiglu"  # relu | gelu | geglu | swiglu
  m.tied_head = True
  m.dropout = 0.0
  m.dtype = "float32"  # of activations: float32 | bfloat16; parameters and router stay float32
  m.remat = False  # recompute each layer in the backward pass
  m.patch_size = 4  # vit, limoe: pixels along an edge of a patch
  # vit: what of the last layer is read: token (a class token's) | mean (over patches; limoe: this only)
  m.pool = "token"
  # vit: width of a tanh layer before the head; 0: none. limoe: of what is compared; 0: embed_dim
  m.representation_dim = 0
  m.head_bias = 0.0  # vit: initial bias of the head

  m.num_experts = 8  # 0: dense, no router
  m.moe_every = 2  # layers n-1, 2n-1, ... are sparse
  m.moe_layers = ()  # which layers are sparse, instead of moe_every
  m.depth_layers = ()  # dense layers of an encoder that only `depth_capacity` of the tokens pass through
  m.depth_capacity = 0.125  # (Mixture-of-Depths): those with the largest score of each row
  m.moe_place = "ffn"  # what is sparse in those layers: ffn | attention (queries, keys, values) | both
  m.expert_dim = placeholder(int)  # hidden width of one expert; None: mlp_dim
  m.expert_activation = placeholder(str)  # of the experts; None: activation
  m.expert_dropout = 0.0
  m.expert_init_scale = 0.1  # variance scale of expert weights (Switch, section 2.4)
  m.multiplicative_bias = False  # multiply each expert's hidden units by a learnt vector (ST-MoE)
  m.extra_ffn = False  # each sparse FFN is followed by a dense one with norm and residual of its own (ST-MoE)
  m.shared_experts = 0  # FFNs of an expert's width that every token passes besides (DeepSeekMoE)
  m.shared_gate = False  # multiply their sum by sigmoid(x w), as Qwen2-MoE
  m.router = _router()
  # Probability, per step and sparse layer, that tokens stay on their machine, of `machines` that the experts
  # are spread over in each of `replicas` parts of the batch; skip_experts: then no expert sees them.
  m.gating_dropout = ConfigDict(dict(rate=0.0, machines=1, replicas=1, skip_experts=False))
  m.capacity_factor = 1.25  # 0: dropless
  m.eval_capacity_factor = 2.0
  m.capacity_rule = "flaxformer"  # see moe/capacity.py
  m.min_capacity = placeholder(int)  # fewest slots of an expert; None: the rule's own
  m.group_size = 512  # tokens routed together
  m.dispatch = "ragged"  # einsum | scatter | ragged
  # Of ragged's products: slots | ragged_dot | megablox[:MxKxN]; None: the platform's own.
  m.backend = placeholder(str)
  m.exchange_rows_factor = placeholder(float)  # bound of the dropless exchange; None: the exact worst case
  m.decoder = _decoder_overrides()

  c.data = d = ConfigDict()
  d.source = "embedded"  # embedded | files:PATH | tfds:NAME | package.module:function
  d.dir = ""  # of prepared data (tfds)
  # bytes | path of a sentencepiece model | sentencepiece:SIZE, trained on the source | words, of the source
  # of a limoe | vocabulary:SIZE, which has no words: enough to describe and compile, not to train
  d.tokenizer = "bytes"
  # causal | span_corruption | of images' classes: softmax, sigmoid | of images and texts: contrastive
  d.objective = "causal"
  d.length = 256  # of decoder inputs; for span corruption of encoder inputs; limoe: most tokens of a text
  d.target_length = placeholder(int)  # span corruption: of the targets; None: what the spans need
  d.noise_density = 0.15
  d.mean_span = placeholder(float)  # None: 3 for subwords, 20 for bytes
  d.valid_share = 0.08  # share of documents, or of each class's images, held out for validation
  d.image = _image()

  c.optimizer = o = ConfigDict()
  o.name = "adamw"  # adamw | adafactor
  o.learning_rate = 3e-3  # the peak
  # cosine | linear | rsqrt | rsqrt_held (without warm-up: at the peak until then) | constant
  o.schedule = "cosine"
  o.warmup_steps = 50
  o.weight_decay = 0.01
  o.b1 = 0.9
  o.b2 = 0.98
  o.clip_norm = 1.0  # global norm; 0: none

  c.train = t = ConfigDict()
  t.steps = 500
  t.batch_size = 16  # rows
  t.accumulate = 1  # micro-batches per step, in whole routing groups
  t.seed = 0
  t.only = "*"  # which parameters train, written as `init_take`; the rest stays as it is
  t.skip_nonfinite = False  # leave out updates whose loss or gradient is not finite, instead of stopping
  t.input_timeout = 300.0  # seconds to wait for a batch before the run stops
  t.log_every = 10
  t.eval_every = 100
  t.checkpoint_every = 100
  t.keep_checkpoints = 3
  t.layer_losses = "mean"  # mean | sum: how the sparse layers' losses add up

  c.eval = e = ConfigDict()
  e.batch_size = 32  # rows
  e.train_windows = 256  # evaluated while training; the first ones of the frozen list
  e.min_bytes = 1_000_000  # evaluated at the end and by `evaluate`

  c.seed = ConfigDict()  # each None: train.seed
  for name in SEEDS:
    c.seed[name] = placeholder(int)

  c.mesh = ConfigDict(dict(data=1, expert=1, model=1, fsdp=False))  # devices along each axis, of all slices
  c.mesh.dcn = ConfigDict(dict(data=1, expert=1, model=1))  # into how many slices an axis is cut
  return c.lock()
