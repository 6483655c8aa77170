"""Which of several answers a language model finds likeliest: each one's log-likelihood after the same prompt.

Brown et al. 2020 (GPT-3), section 2.4, ranks by it, and also by its mean over an answer's length. Here the
second is per UTF-8 byte, so that it does not depend on the tokenizer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.models import Batch, Buffers, Model, Params
from sparse_experts.tasks import sums as of
from sparse_experts.tasks.task import Pairs


def is_possible(model: Model) -> bool:
  """Whether its decoder can decode with a cache, which the prompt of all answers is in."""
  return all(layer.routing_causality == "self" for name, layer in model.sparse_layers.items()
             if name.startswith("decoder"))


def log_likelihoods(model: Any, params: Params, buffers: Buffers, batch: Batch) -> Array:
  """log p(answer | prompt) [B, C], of all tokens of an answer, EOS included.

  batch: of `data/labelled/datasets.py`, with `answers` [B, C, A]. The prompt of a decoder is what its row
  holds before the first target of weight, that of an encoder-decoder is in its encoder. model: dropless.
  """
  inputs_BL, answer_BCA = batch["decoder_inputs"], batch["answers"]
  (B, L), A = inputs_BL.shape, answer_BCA.shape[-1]
  start_B = (batch["weights"] > 0).argmax(-1)  # the place of the last token of the context
  # The cache wants shorter prompts padded on the left.
  from_BP = jnp.arange(L - 1)[None] - (L - 1 - start_B[:, None])
  before_BP = jnp.take_along_axis(inputs_BL, jnp.maximum(from_BP, 0), axis=1)
  last_B1 = jnp.take_along_axis(inputs_BL, start_B[:, None], axis=1)
  encoded = {"encoded": model.encode(params, buffers, batch)} if "encoder_inputs" in batch else {}
  cache = model.init_cache(B, L - 1 + A)
  _, cache = model.decode(params, buffers, cache, before_BP, from_BP >= 0, **encoded)

  def log_likelihood(answer_BA: Array) -> Array:
    inputs_BA = jnp.concatenate([last_B1, jnp.maximum(answer_BA[:, :-1], 0)], axis=1)
    logits_BAV, _ = model.decode(params, buffers, cache, inputs_BA, **encoded)
    ce_BA = of.cross_entropy(logits_BAV, jnp.maximum(answer_BA, 0))
    return -jnp.where(answer_BA >= 0, ce_BA, 0.0).sum(-1)

  return jax.lax.map(log_likelihood, jnp.moveaxis(answer_BCA, 1, 0)).T


def sums(model: Any, params: Params, buffers: Buffers, batch: Batch) -> Pairs:
  """`accuracy`, `accuracy_per_byte` and `nats_per_label` of a batch's texts, as pairs."""
  score_BC = log_likelihoods(model, params, buffers, batch)
  label_B, real_B = batch["label"], (batch["weights"] > 0).any(-1)
  right = lambda score_BC: of.over((score_BC.argmax(-1) == label_B).astype(jnp.float32), real_B)
  nats_B = -jnp.take_along_axis(jax.nn.log_softmax(score_BC), label_B[:, None], axis=1)[:, 0]
  return {"accuracy": right(score_BC), "nats_per_label": of.over(nats_B, real_B),
          "accuracy_per_byte": right(score_BC / jnp.maximum(batch["answer_bytes"], 1))}
