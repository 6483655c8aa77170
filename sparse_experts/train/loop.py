"""Trains a config in a work directory; on the same directory again, it goes on from the last checkpoint.

The state after step s and the records from s * B on determine everything that follows: a run that was
killed and resumed ends with the same bits as one that was not.
"""

import contextlib
import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from sparse_experts import partitioning
from sparse_experts.config import seeds, to_json
from sparse_experts.data import Feed, lengths, make_dataset, make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.models.build import build
from sparse_experts.train import evaluate
from sparse_experts.train import workdir as wd
from sparse_experts.train.checkpoints import Checkpoints
from sparse_experts.train.log import Log
from sparse_experts.train.optimizer import make_optimizer
from sparse_experts.train.profile import Profiler
from sparse_experts.train.run import Run, initial_params, keep_compiled_programs, source_of
from sparse_experts.train.state import TrainState, abstract_state, make_state, shardings
from sparse_experts.train.step import make_train_step
from sparse_experts.validation import validate


def train(config: ConfigDict, workdir: str, *, router: Any = None, data: Any = None, profile: int = 0) -> Run:
  """Trains to `config.train.steps` and returns the run.

  router: an instance that every sparse layer starts from, instead of `config.model.router`.
  data: documents (`__len__`, `__getitem__`) or an object with `.train` and `.valid`, instead of the source.
  profile: of so many steps, once the run is warm, a trace in `workdir`/profile and a table on stderr.
  """
  validate(config)
  keep_compiled_programs()
  mesh = partitioning.make_mesh(config.mesh.data, config.mesh.expert, config.mesh.model)
  changed = wd.claim(workdir, config)
  source = source_of(config, data)
  tokenizer = wd.read_tokenizer(workdir)
  if tokenizer is None:
    tokenizer = make_tokenizer(config.data.tokenizer, (d["text"] for d in source.train))
  model = build(config, tokenizer.vocab_size, "train", router=router)
  length = lengths(config.data, tokenizer)
  check_groups(config, model, length)
  optimizer = make_optimizer(config, model.axes)
  abstract = abstract_state(model, optimizer, mesh, config.mesh.fsdp)
  train_data, valid_data = (make_dataset(config, split, tokenizer, source) for split in ("train", "valid"))
  evaluator = evaluate.Evaluator(
      evaluate.eval_model(config, tokenizer.vocab_size, router=router), config, mesh, valid_data)

  with contextlib.ExitStack() as stack:
    stack.enter_context(partitioning.use(mesh))
    checkpoints = stack.enter_context(Checkpoints(wd.checkpoints(workdir), config.train.keep_checkpoints))
    state = start(config, checkpoints, model, optimizer, abstract, source.fingerprint)
    first = int(state.step)
    profiler = stack.enter_context(contextlib.closing(
        Profiler(profile, wd.profile(workdir), config, first)))
    if jax.process_index() == 0:
      wd.keep(workdir, config, tokenizer)
    tokens = config.train.batch_size * (length["encoder"] + length["targets"])
    log = stack.enter_context(contextlib.closing(Log(workdir, config, first, changed, tokens)))
    if first >= config.train.steps:
      log.say(f"{workdir} is at step {first} of {config.train.steps}: nothing left to train")
    else:
      feed = Feed(train_data, config.train.batch_size, partitioning.batch_sharding(mesh), first)
      stack.enter_context(contextlib.closing(feed))
      step = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0,
                     out_shardings=(shardings(abstract), partitioning.replicated(mesh)))
      save = functools.partial(
          checkpoints.save, meta={"config": to_json(config), "data_fingerprint": source.fingerprint})
      state = _steps(config, state, step, profiler, feed, evaluator, valid_data, save, log)
  return Run(config, int(state.step), state.params, state.buffers, tokenizer, mesh, source.fingerprint,
             router)


def _steps(config, state, step, profiler, feed, evaluator, valid_data, save, log) -> TrainState:
  t = config.train
  for batch in feed:
    if not log.started:
      with log.compiling():
        step = step.lower(state, batch).compile()
    state, pairs = profiler(step, state, batch, log)
    log.add(pairs)
    done = log.done
    last, eval_loss, row = done == t.steps, None, {}
    if done % t.log_every == 0 or last:
      row |= log.interval()
    if done % t.eval_every == 0 or last:
      with log.pause(state):
        numbers = evaluator(state.params, state.buffers, config.eval.train_windows)
      eval_loss = numbers[evaluate.PRIMARY]
      row |= {f"eval/{k}": v for k, v in numbers.items()}
    if last:
      final = _final(config, state, evaluator, valid_data)
      row |= {f"eval/final/{k}": v for k, v in final.items()}
    if row:
      log.write({"step": done} | row)
    if done % t.checkpoint_every == 0 or last:
      with log.pause(state):
        save(state, eval_loss=eval_loss)
    if last:
      log.say(evaluate.in_words(final))
      break
  return state


def _final(config, state, evaluator, valid_data) -> dict[str, float]:
  """The primary figure over at least `eval.min_bytes` bytes, beside what counting alone would reach."""
  records = valid_data.records_for_bytes(config.eval.min_bytes)
  return evaluator(state.params, state.buffers, records) | evaluate.entropies(valid_data, records)


def start(config: ConfigDict, checkpoints: Checkpoints, model: Any, optimizer: Any, abstract: TrainState,
          fingerprint: str) -> TrainState:
  """The newest checkpoint on this mesh, or the state before the first step."""
  newest = checkpoints.latest()
  if newest is None:
    state = make_state(model, optimizer, seeds(config)["init"], abstract)
    return state.replace(params=initial_params(config, abstract.params)) if config.init_from else state
  then = checkpoints.meta(newest)["data_fingerprint"]
  if then != fingerprint:
    raise UserError(f"the data have fingerprint {fingerprint[:12]}, those of the checkpoint {then[:12]}; "
                    "give data.source what the run was started with, or choose another workdir")
  return checkpoints.restore(abstract, newest)


def check_groups(config: ConfigDict, model: Any, length: dict[str, int]) -> None:
  """Whole routing groups per device and micro-batch, also where the length follows from the tokenizer."""
  shards = config.mesh.data * config.mesh.expert
  rows = config.train.batch_size // config.train.accumulate
  for name, layer in model.sparse_layers.items():
    tokens = rows * length["encoder" if name.startswith("encoder") else "targets"]
    if tokens % (layer.group_size * shards):
      raise UserError(
          f"layer {name}: {tokens} tokens of a batch do not make groups of group_size={layer.group_size} for"
          f" each of {shards} data x expert shards; choose a group size that divides {tokens // shards}, or"
          " another train.batch_size or data.target_length")
