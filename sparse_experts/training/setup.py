"""Builds all that a run needs before its first step, and starts or resumes it in its work directory."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sparse_experts import partitioning, processes
from sparse_experts.config import check_config, flat, seeds
from sparse_experts.config.code_names import trust_all
from sparse_experts.data import Dataset, Source, Vocabulary
from sparse_experts.data.feed import Feed, in_time
from sparse_experts.errors import UserError
from sparse_experts.models import Batch, Model, Params, build, counts, even_load, names
from sparse_experts.moe import Router, draws
from sparse_experts.peers import COME
from sparse_experts.tasks import task_of
from sparse_experts.training import about, distill, evaluate, identity, init_from, memory, selection
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.compiled import keep_compiled_programs
from sparse_experts.training.log import Log, say
from sparse_experts.training.one_trainer import hold
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.run import FINGERPRINT, check_routers, source_of, with_given
from sparse_experts.training.session import Session
from sparse_experts.training.state import TrainState, abstract_state, make_state
from sparse_experts.validation import validate


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
  """Everything of a run except its state. Runs that differ in seeds only share all that `for_seed` keeps."""

  config: ConfigDict
  workdir: str
  changed: dict[str, list]  # keys of the config that differ in a resumed run
  source: Source
  tokenizer: Vocabulary
  mesh: Mesh
  model: Model
  optimizer: optax.GradientTransformation
  abstract: TrainState
  train_data: Dataset
  valid_data: Dataset
  evaluator: evaluate.Evaluator
  tokens: int  # of one step
  teacher: distill.Teacher | None

  def for_seed(self, config: ConfigDict, workdir: str) -> "Setup":
    """The setup of a config that differs in its seeds only."""
    return dataclasses.replace(
        self, config=config, workdir=workdir, changed=_claim(workdir, config),
        train_data=task_of(config).make_dataset("train", self.tokenizer, self.source))

  def begin(self, stack: contextlib.ExitStack) -> tuple[TrainState, Session]:
    """(state, session) at the newest checkpoint or before the first step; writes config.json and tokenizer.

    Call it within `partitioning.use(mesh)`. Leaving `stack` closes what the session has open. Refuses a
    folder in which another training is under way.
    """
    lease = hold(self.workdir, stack)
    _claim(self.workdir, self.config)  # again: now no other process can make it another config's
    checkpoints = stack.enter_context(
        Checkpoints(wd.checkpoints(self.workdir), self.config.train.keep_checkpoints))
    state = self._start(checkpoints)
    if warning := even_load.warning(self.model.sparse_layers):
      say(f"warning: {warning}")
    found = identity.newest(checkpoints)
    run = identity.read_id(self.workdir) or (found[0].get("run") if found else None) or identity.new_id()
    with wd.writing(self.workdir):
      if jax.process_index() == 0:
        for message in wd.keep(self.workdir, self.config, self.tokenizer, identity.id_file(run)):
          say(message)
      log = stack.enter_context(contextlib.closing(
          Log(self.workdir, self.config, int(state.step), self.changed, self._about())))
    meta = identity.describe(self.config, self.tokenizer, self.source.fingerprint, run)
    meta |= {} if self.teacher is None else {"teacher": self.teacher.checkpoint}
    return state, Session(
        self.config, log, checkpoints, self.evaluator, self.valid_data, meta, lease)

  def feed(self, step: int, stack: contextlib.ExitStack) -> Iterator[Batch]:
    """Batches from `step` on, with the teacher's logits if there is one."""
    feed = stack.enter_context(contextlib.closing(Feed(
        self.train_data, self.config.train.batch_size, partitioning.batch_sharding(self.mesh), step,
        timeout=self.config.train.input_timeout)))
    return feed if self.teacher is None else map(self.teacher, feed)

  @property
  def key(self) -> jax.Array:
    """The key of the noise of all steps."""
    return jax.random.key(seeds(self.config)["noise"])

  def _about(self) -> dict[str, Any]:
    targets = task_of(self.config).row_lengths(self.tokenizer)["targets"]
    counted = counts.describe_model(self.model, self.abstract.params, self.config.data.length, targets)
    passes = 2 if self.config.train.consistency else 1
    return about.about(self.model, counted, self.tokens, self.mesh, passes) | {
        "data_fingerprint": self.source.fingerprint} | (
            {} if self.teacher is None else {"teacher": self.teacher.facts})

  def _start(self, checkpoints: Checkpoints) -> TrainState:
    fingerprint = self.source.fingerprint

    def refuse_others(step: int) -> None:
      meta = identity.check(checkpoints, step, self.workdir, self.config, self.tokenizer)
      if (then := meta["data_fingerprint"]) != fingerprint:
        raise UserError(f"the data have fingerprint {fingerprint[:12]}, those of the checkpoint {then[:12]}; "
                        "set data.source to that of the run, or choose another workdir")
      if self.teacher is not None:
        self.teacher.refuse_another(meta.get("teacher"), self.workdir)

    config, abstract = self.config, self.abstract
    state = checkpoints.restore_newest(abstract, refuse_others, say)
    if state is not None and state.step:
      say(f"resuming {self.workdir} at step {int(state.step)}"
          + (f", changed: {', '.join(self.changed)}" if self.changed else ""))
    if state is None:
      if self.teacher is not None and config.distill.copy:
        config = self.teacher.to_start_from(config, abstract)
      given = init_from.read(config, abstract, self.model.axes, self.tokenizer) if config.init_from else None
      state = make_state(self.model, self.optimizer, seeds(config)["init"], abstract, given)
      if message := init_from.summary(config, abstract.params, given):
        say(message)
    return state


def set_up(config: ConfigDict, workdir: str, router: Router | None = None, data: Any = None) -> Setup:
  """Builds a Setup and checks all that can be checked before anything is written; arguments as of `train`."""
  check_config(config)
  trust_all(config)
  config = with_given(config, router, data)
  processes.compare("the config", lambda: flat(config))
  validate(config)
  keep_compiled_programs()
  check_routers(config, router)
  mesh = partitioning.make_mesh(config.mesh.data, config.mesh.expert, config.mesh.model, dcn=config.mesh.dcn)
  changed = _claim(workdir, config)
  wd.check_shared(workdir)
  source = in_time(lambda: source_of(config, data), config.train.input_timeout,
                   f"data.source='{config.data.source}'")
  task = task_of(config)
  tokenizer = identity.vocabulary(workdir, config, source, say)
  # A process may have to wait for its data as long as input_timeout, which it then says itself.
  processes.compare(
      "the data", lambda: {FINGERPRINT: source.fingerprint, **wd.facts(tokenizer)},
      seconds=config.train.input_timeout + COME)
  model = build(config, tokenizer.vocab_size, "train", router=router)
  length = task.row_lengths(tokenizer)
  check_groups(config, model, length)
  optimizer = make_optimizer(config, model.axes)
  abstract = abstract_state(model, optimizer, mesh, config.mesh.fsdp)
  if not wd.is_claimed(workdir):  # an old run goes on as it began
    check_routers_learn(config, model, abstract.params)
    check_passes_differ(config, model)
  train_data, valid_data = (task.make_dataset(split, tokenizer, source) for split in ("train", "valid"))
  evaluator = evaluate.Evaluator(
      evaluate.eval_model(config, tokenizer.vocab_size, router=router), config, mesh, valid_data)
  memory.check_training(config, model, abstract, length)
  teacher = None
  if config.distill.teacher:
    teacher = distill.open_teacher(config, tokenizer, task.example(tokenizer))
  if message := task.describe_source(source):
    say(message)
  return Setup(
      config, workdir, changed, source, tokenizer, mesh, model, optimizer,
      abstract, train_data, valid_data, evaluator,
      config.train.batch_size * (length["encoder"] + length["targets"]), teacher)


def _claim(workdir: str, config: ConfigDict) -> dict[str, list]:
  return wd.claim(workdir, config, lambda: identity.saved_config(workdir))


def check_groups(config: ConfigDict, model: Model, length: dict[str, int]) -> None:
  """Refuses a config without whole routing groups per device and micro-batch."""
  shards = config.mesh.data * config.mesh.expert
  rows = config.train.batch_size // config.train.accumulate
  for name, layer in model.sparse_layers.items():
    tokens = rows * length["encoder" if name.startswith("encoder") else "targets"]
    if tokens % (layer.group_size * shards):
      raise UserError(
          f"layer {name}: {tokens} tokens of a batch do not make groups of group_size={layer.group_size} for"
          f" each of {shards} data x expert shards; choose a group size that divides {tokens // shards}, or"
          " another train.batch_size or data.target_length")


def check_passes_differ(config: ConfigDict, model: Model) -> None:
  """Refuses `train.consistency` where nothing is drawn: two passes would be one."""
  m, alpha = config.model, config.train.consistency
  layers = model.sparse_layers.values()
  if not alpha or m.dropout or (layers and (m.expert_dropout or m.gating_dropout.rate)):
    return
  width = m.embed_dim // m.moe_heads
  if not any(layer.router is not None and draws(layer.router, width) for layer in layers):
    what = f"router '{m.router.name}' draws nothing" if layers else "the model has no experts"
    raise UserError(f"train.consistency={alpha:g} compares two passes of each batch, but {what} and "
                    "model.dropout=0, so they are the same; set model.dropout, or choose "
                    "model.router.name=random")


def check_routers_learn(config: ConfigDict, model: Model, params: Params) -> None:
  """Refuses a router that is trained but gets no gradient from the task's loss; see `Router.no_gradient`."""
  trained = selection.choose("train.only", config.train.only, names.places(params))
  for layer, of in model.sparse_layers.items():
    why = "" if of.router is None else of.router.no_gradient
    if why and any(name.startswith(f"{layer}/") and "/router/" in name for name in trained):
      raise UserError(f"layer {layer}: the task would teach its router nothing: {why}, or freeze it with "
                      "train.only='-*/router/*'")
