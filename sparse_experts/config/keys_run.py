"""The keys outside `model`: what a run starts from, its data, optimizer, training, evaluation and mesh."""

import functools

from sparse_experts.config.key import CONVERT, EVALUATE, LOG, PLACE, RESUME, TRAINING, Key

SEEDS = ("init", "data", "noise")
MOST_SEED = 2**63 - 1  # what jax.random.key takes

_augment = functools.partial(Key, affects=TRAINING)
_train = functools.partial(Key, affects=TRAINING, also=(CONVERT,))
_eval = functools.partial(Key, also=(EVALUATE, CONVERT), within="1 or more")
_mesh = functools.partial(Key, affects=PLACE, within="1 or more")

START = (
    Key("init_from", "", "DIR[@step]: start from another run's weights", TRAINING),
    Key("init_take", "*", "which of its parameters, as `describe --parameters` names them: globs with commas "
        "between them, one with `-` in front leaves names out ('*,-*/ffn/*'); the others start fresh",
        TRAINING),
    Key("init_upcycle", False, "experts are copies of the other run's dense FFNs; routers start fresh",
        TRAINING),
    Key("init_optimizer", "fresh", "step: continue the other run's step count, which learning rate and data "
        "follow; moments: keep the optimizer's moments of what is taken as well", TRAINING,
        choices=("fresh", "step", "moments")),
    Key("distill.teacher", "", "DIR[@step]: a trained run of the same tokenizer, from whose probabilities "
        "this run learns", TRAINING),
    Key("distill.weight", 0.25, "share of the teacher's probabilities in the loss; the rest is the data's "
        "(Switch, section 4.2)", TRAINING, within="0 to 1"),
    Key("distill.copy", True, "start from those of the teacher's parameters that have a name here, "
        "experts and routers aside", TRAINING),
    Key("given.router", str, "class of the router instance given to `train`, which sets this"),
    Key("given.data", str, "class of the data given to `train`, which sets this", also=(RESUME,)),
)

DATA = (
    Key("data.source", "embedded", "embedded | files:PATH | tfds:NAME | package.module:function | of texts "
        "also several of these with rates, 'mixture:code 0.7 embedded; books 0.3 files:PATH'",
        also=(EVALUATE, CONVERT)),
    Key("data.dir", "", "folder or address of prepared data (tfds)", PLACE),
    Key("data.tokenizer", "bytes", "bytes | path of a sentencepiece model, a tokenizer.json or a run's "
        "tokenizer.model | sentencepiece:SIZE, trained on the source | words, limoe: those of the source | "
        "vocabulary:SIZE, texts are ids with spaces between them"),
    Key("data.objective", "causal", "what is learnt: texts (causal, span_corruption), words for their labels "
        "(text_classification), classes of images (softmax, sigmoid), or pairs of image and text "
        "(contrastive); see tasks/__init__.py"),
    Key("data.length", 256, "tokens of a decoder's input; seq2seq: of the encoder's; limoe: most of a text",
        within="2 or more", most=2**24, also=(CONVERT,)),
    Key("data.target_length", int, "seq2seq: tokens of the targets; unset: what the spans need, or 32 for "
        "text_classification", within="2 or more", most=2**24, also=(CONVERT,)),
    Key("data.prompt", "{text}\nlabel:", "text_classification and `evaluate --few_shot`: what stands "
        "before a label's words, with {text} where the text goes", also=(EVALUATE,)),
    Key("data.label_words", "", "text_classification and `evaluate --few_shot`: words for labels, 'pos=good,"
        "neg=bad'; others are read as they are, _ as a space", also=(EVALUATE,)),
    Key("data.noise_density", 0.15, "span corruption: share of the tokens that is masked",
        within="from above 0 to below 1"),
    Key("data.mean_span", float, "span corruption: mean tokens of a masked span; unset: 3 for subwords, 20 "
        "for bytes", within="1 or more"),
    Key("data.valid_share", 0.08, "share of documents, or of each class's images, held out for validation",
        within="from above 0 to below 1"),
    Key("data.image.size", 8, "pixels along an edge, after resizing and cropping to a square",
        within="1 or more", most=2**14),
    Key("data.image.classes", int, "rows of the head; unset: the source's classes", within="2 or more"),
    Key("data.image.skip_unreadable", False, "leave out images that cannot be read and count them, instead "
        "of stopping"),
    _augment("data.image.crop_area", 1.0, "training: smallest share of the area that a random crop keeps, of "
             "aspect ratio 3/4 to 4/3; 1: no crop", within="above 0 to 1 (no crop)"),
    _augment("data.image.shift", 0, "training: largest shift of the image each way in pixels, edges repeated",
             within="0 or more", most=2**12),
    _augment("data.image.flip", False, "training: mirror every second image, left to right"),
    _augment("data.image.randaugment_layers", 0, "training: RandAugment operations in a row",
             within="0 or more", most=100),
    _augment("data.image.randaugment_magnitude", 10.0, "training: strength of RandAugment", within="0 to 30"),
    _augment("data.image.mixup", 0.0, "training: blend two images with a share from Beta(mixup, mixup); 0: "
             "none", within="0 or more"),
)

TRAIN = (
    _train("optimizer.name", "adamw", "the optimizer", choices=("adamw", "adafactor")),
    _train("optimizer.learning_rate", 3e-3, "the peak learning rate", within="0 or more", most=10**38),
    _train("optimizer.schedule", "cosine", "how the learning rate goes on after the warm-up; rsqrt_held: "
           "without one, at the peak until warmup_steps",
           choices=("cosine", "linear", "rsqrt", "rsqrt_held", "constant")),
    _train("optimizer.warmup_steps", 50, "steps in which the learning rate rises to the peak",
           within="0 or more"),
    _train("optimizer.weight_decay", 0.01, "decoupled weight decay", within="0 or more"),
    _train("optimizer.b1", 0.9, "decay of the first moment", within="from 0 to below 1"),
    _train("optimizer.b2", 0.98, "decay of the second moment", within="from 0 to below 1"),
    _train("optimizer.clip_norm", 1.0, "bound of the gradient's global norm; 0: none", within="0 or more"),
    _train("train.steps", 500, "steps of the whole run", within="0 or more", also=(RESUME, CONVERT)),
    _train("train.batch_size", 16, "rows of a batch", within="1 or more", most=2**20),
    _train("train.accumulate", 1, "micro-batches per step, in whole routing groups", within="1 or more"),
    _train("train.seed", 0, "the seed of everything random", within="0 or more", most=MOST_SEED),
    _train("train.only", "*", "which parameters are trained, written as init_take; the others stay as "
           "they are"),
    _train("train.skip_nonfinite", False, "leave out updates whose loss or gradient is not finite, instead "
           "of stopping", also=(RESUME, CONVERT)),
    Key("train.memory", float, "GiB that training on CPUs may plan with; unset: what the machine has, or its "
        "control group or ulimit allows", PLACE, within="0 or more"),
    Key("train.input_timeout", 300.0, "seconds to wait for a batch before the run stops", LOG,
        within="0 or more"),
    Key("train.log_every", 10, "steps between rows of the log", LOG, within="1 or more"),
    Key("train.eval_every", 100, "steps between evaluations", LOG, within="1 or more"),
    Key("train.checkpoint_every", 100, "steps between checkpoints", LOG, within="1 or more"),
    Key("train.keep_checkpoints", 3, "how many of the newest checkpoints are kept, next to the one with "
        "the lowest evaluation loss", LOG, within="1 or more"),
    _train("train.label_smoothing", 0.0, "share of a target's probability that is spread evenly over all "
           "values while training", within="from 0 to below 1"),
    _train("train.consistency", 0.0, "THOR's alpha: each batch makes two passes that draw their own experts "
           "and dropout, and this weighs how far their predictions diverge; 0: one pass", within="0 or more"),
    _train("train.layer_losses", str, "whether the auxiliary losses of the sparse layers are summed or "
           "averaged; pooled: each stack's is one loss of the tokens of all its layers, as in Hugging Face's "
           "models, and stacks sum; unset: each router's own, see `describe --routers`",
           choices=("mean", "sum", "pooled")),
    _eval("eval.batch_size", 32, "rows of a batch in evaluation", most=2**20),
    _eval("eval.train_windows", 256, "rows evaluated while training: the first ones of the frozen list"),
    _eval("eval.min_bytes", 1_000_000, "bytes of text evaluated at the end and by `evaluate`, at least",
          most=2**53),
    _train("seed.init", int, "seed of the initial weights; unset: train.seed", within="0 or more",
           most=MOST_SEED),
    _train("seed.data", int, "seed of the data's order and of masked spans; unset: train.seed",
           within="0 or more", most=MOST_SEED),
    _train("seed.noise", int, "seed of jitter, dropout and the like; unset: train.seed", within="0 or more",
           most=MOST_SEED),
)

MESH = (
    _mesh("mesh.data", 1, "devices that the batch is spread over, in all slices"),
    _mesh("mesh.expert", 1, "devices that the experts are spread over, in all slices"),
    _mesh("mesh.model", 1, "devices that hidden widths, heads and vocabulary are spread over, in all slices"),
    Key("mesh.fsdp", False, "spread parameters and optimizer state outside experts over data and expert too",
        PLACE),
    _mesh("mesh.dcn.data", 1, "slices that the axis data is cut into"),
    _mesh("mesh.dcn.expert", 1, "slices that the axis expert is cut into"),
    _mesh("mesh.dcn.model", 1, "slices that the axis model is cut into"),
)
