"""Runs without training: random weights, large enough that routing is uneven, on made-up text."""

import dataclasses
import functools

import jax
import numpy as np

from sparse_experts import partitioning
from sparse_experts.data import make_tokenizer
from sparse_experts.models.build import build
from sparse_experts.tasks import task_of
from sparse_experts.training.run import Run
from tests.training.tiny import documents, tiny_config


def bare_run(mesh=(1, 1, 1), router=None, **keys) -> Run:
  """A `Run` at step 0 of `tiny_config(**keys)`, without weights."""
  return Run(tiny_config(**keys), 0, None, None, make_tokenizer("bytes"), partitioning.make_mesh(*mesh), "",
             router)


@functools.cache
def tiny_run(mesh=(1, 1, 1), router=None, **keys) -> Run:
  """With weights, the same on every mesh; drawn by numpy, as compiling a model's own draws takes seconds."""
  run = bare_run(mesh, router, **keys)
  model, rng = build(run.config, run.tokenizer.vocab_size, router=router), np.random.default_rng(0)
  params, buffers = jax.eval_shape(model.init, jax.random.key(0))
  assert not buffers

  def draw(path, x):
    is_norm = path[-1].key == "scale"
    return np.ones(x.shape, x.dtype) if is_norm else rng.normal(0, 0.3, x.shape).astype(x.dtype)

  params = jax.device_put(jax.tree.map_with_path(draw, params), partitioning.shardings(model.axes, run.mesh))
  return dataclasses.replace(run, params=params, buffers=buffers)


def tiny_dataset(run: Run):
  """Of three domains."""
  texts = [dict(text=text, domain=i % 3) for i, text in enumerate(documents())]
  task = task_of(run.config)
  return task.make_dataset("valid", run.tokenizer, task.as_source(texts))


# Two sparse layers, groups of two rows.
DECODER = dict(model__moe_every=1, model__router__k=2, model__router__gate="renormalized",
               model__group_size=64, model__eval_capacity_factor=0.7)
# The same, each token in two parts.
HEADS = DECODER | dict(model__moe_heads=2)
# Encoder rows of 32 tokens routed to one of 4 experts, decoder rows of 12 to three of 8.
SEQ2SEQ = dict(
    model__name="seq2seq", data__objective="span_corruption", data__target_length=12, data__mean_span=5.0,
    model__num_experts=4, model__decoder__num_experts=8, model__decoder__group_size=24,
    model__decoder__router__k=3)
