"""What experts of an encoder and of a decoder specialise in (Zoph et al. 2022, ST-MoE, section 7).

A small encoder-decoder learns span corruption of bytes of the standard library's sources, both of its stacks
with ST-MoE's routing in their second layer. An arm is one reading of such a run: `stack` (encoder or
decoder), and `router` where it differs from top-2. So two arms of one seed are the same run, trained once.

Of tokens that no run trained on, dropless. Groups have as many tokens in the encoder as in the decoder, while
the paper's have 2048 and 456.
"""

import functools
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import special

from sparse_experts import train
from sparse_experts.analysis import probe, specialisation, token_text, trace
from sparse_experts.config import ConfigDict, default_config

RECORDS = 128  # of the probe
STEPS, UNTAUGHT_STEPS, QUICK_STEPS = 250, 50, 4  # of a router that learns, and of one that does not
SHUFFLES = 100  # of the experts among a layer's tokens: the null of an entropy
ROUTERS: dict[str, dict[str, Any]] = {
  "top_k": dict(name="top_k", k=2, gate="renormalized", skip_threshold=0.2, load_balance_weight=1e-2,
                z_weight=1e-3),
  "hash": dict(name="hash"),
  "random": dict(name="random", draw="token"),
}


def config_of(router: str, seed: int, quick: bool) -> ConfigDict:
  """The run: 2 layers of width 64 in each stack, the second one sparse, with 16 experts."""
  config = default_config()
  model, data = config.model, config.data
  model.name, model.num_layers, model.activation = "seq2seq", 2, "geglu"
  model.embed_dim, model.num_heads, model.head_dim = 64, 2, 32
  model.mlp_dim, model.num_experts, model.expert_dim = 128, 16, 64
  with model.router.unlocked():
    model.router.update(ROUTERS[router])
  model.capacity_factor, model.eval_capacity_factor, model.capacity_rule = 1.25, 2.0, "flaxformer"
  model.group_size = model.decoder.group_size = 256  # a row of the encoder, four of the decoder
  data.objective, data.length, data.target_length = "span_corruption", 256, 64
  data.noise_density, data.mean_span = 0.15, 5.0  # nine sentinels a row
  config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, 50
  steps = QUICK_STEPS if quick else STEPS if router == "top_k" else UNTAUGHT_STEPS
  config.train.steps = config.train.eval_every = config.train.checkpoint_every = steps
  config.train.batch_size, config.train.seed, config.train.layer_losses = 8, seed, "mean"
  config.eval.min_bytes, config.eval.train_windows = 1000, 32
  return config.lock()


def sentinel_entropy(arm: Mapping[str, Any], seed: int, quick: bool) -> float:
  """Nats: entropy over experts of the sentinels' assignments, mean over the stack's sparse layers.

  As published. log 16 = 2.77 if sentinels go to all experts alike.
  """
  return _mean(arm, seed, quick, "entropy")


def sentinel_entropy_above_chance(arm: Mapping[str, Any], seed: int, quick: bool) -> float:
  """`sentinel_entropy` minus that of as many assignments drawn from all of the layer: 0 without
  specialisation, below 0 with it. Uneven loads and small numbers of sentinels count for nothing."""
  return _mean(arm, seed, quick, "above_chance")


def class_information(arm: Mapping[str, Any], seed: int, quick: bool) -> float:
  """Normalised mutual information of expert and class of the byte (digit, bracket, lowercase letter, ...)
  less its mean over permutations, mean over the stack's sparse layers. Sentinels and ends are left out, as
  the stacks have other shares of them; masked bytes are a random sample of the text."""
  return _mean(arm, seed, quick, "classes")


def _mean(arm: Mapping[str, Any], seed: int, quick: bool, name: str) -> float:
  layers = _figures(arm.get("router", "top_k"), seed, quick)
  return float(np.mean([found[name] for layer, found in layers.items() if layer.startswith(arm["stack"])]))


@functools.lru_cache(maxsize=64)
def _figures(router: str, seed: int, quick: bool) -> dict[str, dict[str, float]]:
  """{layer: figures} of one trained run."""
  config = config_of(router, seed, quick)
  with tempfile.TemporaryDirectory() as folder:
    run = train(config, folder)
  seen = trace.trace(run, probe.probe(run, 8 if quick else RECORDS))
  tokenizer = run.tokenizer
  class_V = np.array([token_text.token_class(tokenizer, i) for i in range(tokenizer.vocab_size)])
  sentinels = [tokenizer.sentinel(i) for i in range(tokenizer.num_sentinels)]
  of = lambda layer: {name: a[(seen["layer"] == layer) & seen["valid"]] for name, a in seen.items()}
  return {str(layer): _of_layer(of(layer), class_V, sentinels, config.model.num_experts)
          for layer in np.unique(seen["layer"])}


def _of_layer(seen: Mapping[str, np.ndarray], class_V: np.ndarray, sentinels: list[int],
              num_experts: int) -> dict[str, float]:
  expert_N, rng = seen["expert"], np.random.default_rng(0)
  is_sentinel_N = np.isin(seen["token_id"], sentinels)
  own = entropy(expert_N[is_sentinel_N], num_experts)
  chance = np.mean([entropy(rng.choice(expert_N, is_sentinel_N.sum(), replace=False), num_experts)
                    for _ in range(SHUFFLES)])
  classes, class_N = np.unique(class_V[seen["token_id"]], return_inverse=True)
  text_N = class_N != np.flatnonzero(classes == "mark")[0]
  above = specialisation.specialisation(class_N[text_N], len(classes), expert_N[text_N], num_experts,
                                        seen["example"][text_N])["above"]
  return {"entropy": own, "above_chance": float(own - chance), "classes": above}


def entropy(expert_N: np.ndarray, num_experts: int) -> float:
  """Nats, of the shares of experts."""
  share_E = np.bincount(expert_N, minlength=num_experts) / len(expert_N)
  return -float(special.xlogy(share_E, share_E).sum())
