"""Trains a config in a work directory; on the same directory again, it goes on from the last checkpoint.

The state after step s and the records from s * B on determine everything that follows: a run that was
killed and resumed ends with the same bits as one that was not.
"""

import contextlib
from typing import Any

import jax
from ml_collections import ConfigDict

from sparse_experts import partitioning
from sparse_experts.config import seeds
from sparse_experts.data import Feed, Tokenizer, in_time, lengths, make_dataset, make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.models.build import build
from sparse_experts.train import evaluate, init_from, nonfinite
from sparse_experts.train import workdir as wd
from sparse_experts.train.checkpoints import Checkpoints
from sparse_experts.train.interrupt import Interrupt
from sparse_experts.train.log import Log, say
from sparse_experts.train.optimizer import make_optimizer
from sparse_experts.train.profile import Profiler
from sparse_experts.train.run import Run, check_routers, keep_compiled_programs, source_of, with_given
from sparse_experts.train.session import NonFinite, Session
from sparse_experts.train.state import TrainState, abstract_state, make_state, shardings
from sparse_experts.train.step import make_train_step
from sparse_experts.validation import validate


def train(config: ConfigDict, workdir: str, *, router: Any = None, data: Any = None, profile: int = 0) -> Run:
  """Trains to `config.train.steps` and returns the run.

  router: an instance that every sparse layer starts from, instead of `config.model.router`.
  data: documents (`__len__`, `__getitem__`) or an object with `.train` and `.valid`, instead of the source.
  profile: of so many steps, once the run is warm, a trace in `workdir`/profile and a table on stderr.
  """
  config = with_given(config, router, data)
  validate(config)
  keep_compiled_programs()
  check_routers(config, router)
  mesh = partitioning.make_mesh(config.mesh.data, config.mesh.expert, config.mesh.model)
  changed = wd.claim(workdir, config)
  source = in_time(lambda: source_of(config, data), config.train.input_timeout,
                   f"data.source='{config.data.source}'")
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
    interrupt = stack.enter_context(Interrupt())
    checkpoints = stack.enter_context(Checkpoints(wd.checkpoints(workdir), config.train.keep_checkpoints))
    state = start(config, checkpoints, model, optimizer, abstract, source.fingerprint, tokenizer)
    first = int(state.step)
    profiler = stack.enter_context(contextlib.closing(
        Profiler(profile, wd.profile(workdir), config, first)))
    if jax.process_index() == 0:
      wd.keep(workdir, config, tokenizer)
    finished = first >= config.train.steps and wd.final_row(workdir)
    tokens = config.train.batch_size * (length["encoder"] + length["targets"])
    log = stack.enter_context(contextlib.closing(Log(workdir, config, first, changed, tokens)))
    session = Session(config, log, checkpoints, evaluator, valid_data, source.fingerprint)
    if finished:
      log.say(f"{workdir} is at step {first} of {config.train.steps}: nothing left to train")
    elif session.complete:
      session.finish(state)
    else:
      feed = Feed(train_data, config.train.batch_size, partitioning.batch_sharding(mesh), first,
                  timeout=config.train.input_timeout)
      stack.enter_context(contextlib.closing(feed))
      step = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0,
                     out_shardings=(shardings(abstract), partitioning.replicated(mesh)))
      key = jax.random.key(seeds(config)["noise"])
      state = _steps(model, state, step, key, feed, session, interrupt, profiler)
  return Run(config, int(state.step), state.params, state.buffers, tokenizer, mesh, source.fingerprint,
             router)


def _steps(model: Any, state: TrainState, step: Any, key: jax.Array, feed: Feed, session: Session,
           interrupt: Interrupt, profiler: Profiler) -> TrainState:
  """Until the last step, or until it is asked to stop: then it saves first, and Ctrl-C stays Ctrl-C."""
  with session.log.compiling():
    batch = before = next(feed)
    step = step.lower(state, batch, key).compile()
  while True:
    state, pairs = profiler(step, (state, batch, key), session.log)
    try:
      session.after(state, pairs)
    except NonFinite as e:
      bad = batch if e.step == session.log.done else before
      where = nonfinite.find(model, state.params, state.buffers, bad, jax.random.fold_in(key, e.step - 1))
      raise NonFinite(e.step, e.saved, where) from None
    if session.complete:
      session.finish(state)
      return state
    if why := interrupt.asked(session.log.done):
      session.stop(state, why)
      if why == "SIGINT":
        raise KeyboardInterrupt
      return state
    try:
      before, batch = batch, next(feed)
    except Exception:
      if jax.process_count() == 1:  # several could not agree on a step
        session.stop(state, "no more data")
      raise


def start(config: ConfigDict, checkpoints: Checkpoints, model: Any, optimizer: Any, abstract: TrainState,
          fingerprint: str, tokenizer: Tokenizer) -> TrainState:
  """The newest checkpoint on this mesh, or the state before the first step."""

  def refuse_other_data(meta: dict[str, Any]) -> None:
    if (then := meta["data_fingerprint"]) != fingerprint:
      raise UserError(f"the data have fingerprint {fingerprint[:12]}, those of the checkpoint {then[:12]}; "
                      "give data.source what the run was started with, or choose another workdir")

  state = checkpoints.restore_newest(abstract, refuse_other_data, say)
  if state is None:
    given = init_from.read(config, abstract, model.axes, tokenizer) if config.init_from else None
    state = make_state(model, optimizer, seeds(config)["init"], abstract, given)
    if told := init_from.summary(config, abstract.params, abstract.buffers):
      say(told)
  return state


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
