"""Folders of runs without training: random weights, large enough that routing is uneven."""

import os

import jax
import numpy as np
import optax

from sparse_experts.config import replaced
from sparse_experts.models import build
from sparse_experts.tasks import task_of
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.run import source_of, with_given
from sparse_experts.training.state import TrainState


def write_run(workdir, config, steps=(2, 4), data=None) -> str:
  """A folder as if `train(config, workdir, data=data)` had saved those steps, each with other weights."""
  workdir, config = str(workdir), with_given(replaced(config, {}), None, data)
  source, task = source_of(config, data), task_of(config)
  vocabulary = task.make_vocabulary(source)
  os.makedirs(workdir, exist_ok=True)
  wd.keep(workdir, config, vocabulary)
  model = build(config, vocabulary.vocab_size)
  params, buffers = jax.eval_shape(model.init, jax.random.key(0))
  with Checkpoints(wd.checkpoints(workdir), 5) as checkpoints:
    for step in steps:
      rng = np.random.default_rng(step)
      draw = lambda x, rng=rng: jax.numpy.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
      state = TrainState(np.asarray(step, np.int32), *jax.tree.map(draw, (params, buffers)),
                         optax.identity().init(params))
      assert checkpoints.save(state, {"data_fingerprint": source.fingerprint}) is None
  return workdir
