"""Loads a trained run, for evaluation, sampling and notebooks."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from sparse_experts import partitioning, processes
from sparse_experts.config import ConfigDict, check_config, code_names, flat, read_config, replaced
from sparse_experts.data import Dataset, Record, Source, Vocabulary
from sparse_experts.errors import UserError
from sparse_experts.models import Batch, Buffers, Model, Params, Routings, build, user_routers
from sparse_experts.moe import Router, check_router
from sparse_experts.tasks import task_of
from sparse_experts.training import batches, identity, memory, parameters
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Steps
from sparse_experts.training.compiled import keep_compiled_programs
from sparse_experts.training.evaluate import eval_model
from sparse_experts.training.log import say
from sparse_experts.training.state import abstract_state

FINGERPRINT = "the fingerprint of the data"  # as processes name it to each other


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A trained run at one step: parameters, and what is needed to use them."""

  config: ConfigDict
  step: int
  params: Params
  buffers: Buffers
  tokenizer: Vocabulary
  mesh: jax.sharding.Mesh
  data_fingerprint: str
  router: Router | None = None  # the instance it was trained with, if not the config's
  _models: dict[str, Model] = dataclasses.field(default_factory=dict, init=False)

  def __repr__(self) -> str:
    c, size = self.config, sum(x.size for x in jax.tree.leaves(self.params))
    layers = self.abstract_model().sparse_layers
    experts = {layer.num_experts for layer in layers.values()}
    routing = f"{' or '.join(map(str, sorted(experts)))} experts" + (
        f", router {type(self.router).__name__ if self.router is not None else c.model.router.name}, in "
        + ", ".join(layers)) if layers else "dense"
    mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
    return "\n  ".join((
        f"Run at step {self.step} of {c.train.steps}: {c.model.name}, {size:,} parameters", routing,
        f"data {c.given.data or c.data.source}, {self.tokenizer.vocab_size} ids or classes; mesh {mesh}",
        ".model(batch), .batch(texts), .dataset(), .parameters(), .set_parameters({name: array}), .config"))

  def abstract_model(self, kind: str = "dropless") -> Model:
    """The model without arrays: dropless, eval_capacity, rerouted or train."""
    if kind not in self._models:
      self._models[kind] = eval_model(self.config, self.tokenizer.vocab_size, kind, self.router)
    return self._models[kind]

  def model(self, batch: Batch, trace: bool = False, kind: str = "dropless") -> tuple[jax.Array, Routings]:
    """(logits_BLV, {layer: Routing}); with `trace` the routings hold their lists. Without noise.

    batch: {field: array}, a row for each record, as `batch(texts)` or `analysis.probe.probe(run, 8)` give it.
      A decoder reads `decoder_inputs`, `segments` (sequences of a row, numbered from 1; 0: padding) and
      `positions` (from 0 in each sequence), int32 [B, L]; an encoder-decoder also `encoder_inputs` and
      `encoder_segments`; a vit `images` [B, H, W, 3] in -1 to 1 and `weights` [B]; a limoe all of those, and
      `texts` and `text_mask` [B, L]. Other fields are ignored.
    """
    batches.check(self.abstract_model(kind).fields, self._example, batch)
    with partitioning.use(self.mesh):
      return self._apply(kind, trace)(self.params, self.buffers, batch)

  @functools.cached_property
  def _example(self) -> Record:
    """A made-up record, for the shapes of a batch."""
    return task_of(self.config).example(self.tokenizer)

  @functools.cache  # noqa: B019  a run lives as long as the program
  def _apply(self, kind: str, trace: bool):
    model = self.abstract_model(kind)
    return jax.jit(lambda params, buffers, batch: model.apply(params, buffers, batch, trace=trace))

  def source(self, data: Any = None) -> Source:
    """The config's data; `data`: what was given to `train`, if it was not the config's source."""
    if data is None and self.config.given.data:
      raise UserError(f"this run was trained on data given as {self.config.given.data}; give it here, "
                      "dataset(data=...), or name another source by config.data.source")
    source = source_of(self.config, data)
    processes.compare("the data", lambda: {FINGERPRINT: source.fingerprint})
    return source

  def dataset(self, split: str = "valid", data: Any = None) -> Dataset:
    """Records as in training; `data` as of `source`."""
    return task_of(self.config).make_dataset(split, self.tokenizer, self.source(data))

  def batch(self, texts: Sequence[str | bytes]) -> Batch:
    """What `model` takes, of texts of your own: a row of `data.length` tokens for each, in order.

    Raises UserError for a text that is too long for a row, and of a run on images.
    """
    return batches.of_texts(self.config, self.tokenizer, texts)

  def parameters(self) -> dict[str, jax.Array]:
    """{name: array} of parameters and buffers, one of each layer; `describe --parameters` has the names."""
    return parameters.named({"params": self.params, "buffers": self.buffers})

  def set_parameters(self, values: Mapping[str, Any]) -> "Run":
    """A run in which these parameters, by the names of `parameters()`, have other values; this one stays.

    Raises UserError for an unknown name or another shape.
    """
    return dataclasses.replace(self, **parameters.replaced(
        {"params": self.params, "buffers": self.buffers}, values))


def with_given(config: ConfigDict, router: Router | None, data: Any) -> ConfigDict:
  """A copy of `config` that records the classes of a given router and given data."""
  return replaced(config, {f"given.{name}": None if x is None else type(x).__name__
                           for name, x in (("router", router), ("data", data))})


def check_routers(config: ConfigDict, router: Router | None = None) -> None:
  """Tries every router that is not the package's own; see `moe.check_router`."""
  if router is not None and not (config.model.num_experts or config.model.decoder.num_experts):
    raise UserError(f"router {type(router).__name__} is given, but model.num_experts=0 leaves no layer for "
                    "it; set model.num_experts, or leave the router out")
  for mine in [router] if router is not None else user_routers(config):
    check_router(mine, config.model.embed_dim)


def source_of(config: ConfigDict, data: Any = None) -> Source:
  """`data` as a source, or the config's own without it."""
  if data is None:
    return task_of(config).open_source()
  return task_of(config).as_source(data, name=f"data ({type(data).__name__})")


def on_these_devices(config: ConfigDict) -> ConfigDict:
  """`config`; where its mesh needs more devices than there are, on a mesh that these make, which is said.

  What is measured does not depend on the mesh. Experts and widths stay spread as far as devices go; rows of a
  batch are not.
  """
  mesh, here = config.mesh, jax.device_count()
  if mesh.data * mesh.expert * mesh.model <= here:
    return config
  expert = math.gcd(mesh.expert, here)
  smaller = {"data": 1, "expert": expert, "model": math.gcd(mesh.model, here // expert),
             "dcn.data": 1, "dcn.expert": 1, "dcn.model": 1}
  shown = ", ".join(f"{axis}={smaller[axis]}" for axis in ("data", "expert", "model"))
  say(f"the run's mesh has more devices than the {here} here; loaded on {shown}")
  return replaced(config, {f"mesh.{axis}": size for axis, size in smaller.items()})


def load(workdir: str, step: int | None = None, *, config: ConfigDict | None = None,
         router: Router | None = None) -> Run:
  """The run in `workdir` at `step` (the newest by default), on the mesh of its config, or where there are
  fewer devices on a smaller one.

  `config`: the run's config with another mesh, evaluation or capacity. `router`: as given to `train`;
  its class is checked.
  """
  keep_compiled_programs()
  workdir = os.fspath(workdir)
  kept = read_config(workdir)
  if config is not None:
    check_config(config)
  config = on_these_devices(kept) if config is None else config
  theirs, ours = kept.given.router, None if router is None else type(router).__name__
  if theirs != ours:
    as_trained = f", router={theirs}(...)" if theirs else ""
    raise UserError(f"workdir {workdir} was trained with router instance {theirs or 'none'}, not "
                    f"{ours or 'none'}; load it in Python, sparse_experts.load({workdir!r}{as_trained})")
  processes.compare("the config", lambda: flat(config))
  if config.data.source != kept.data.source:  # other data than those of training
    config = with_given(config, router, None)
  tokenizer = wd.read_tokenizer(workdir, kept)
  if tokenizer is None:
    raise UserError(f"workdir {workdir} has no tokenizer.model; train the run first, or name another workdir")
  for name in filter(None, (config.model.router.name, config.model.decoder.router.name)):
    code_names.check(name)
  steps = Steps(wd.checkpoints(workdir))
  step = steps.choose(step)
  meta = identity.check(steps, step, workdir, kept, tokenizer)
  mesh = partitioning.make_mesh(config.mesh.data, config.mesh.expert, config.mesh.model, dcn=config.mesh.dcn)
  model = build(config, tokenizer.vocab_size, "train", router=router)
  abstract = abstract_state(model, optax.identity(), mesh, config.mesh.fsdp)
  memory.check_loading(config, abstract)
  wanted = {"params": abstract.params, "buffers": abstract.buffers}
  processes.compare("the checkpoint", lambda: {"the step": step, **wd.facts(tokenizer)})
  steps.refuse_others(wanted, step)
  restored = steps.restore_part(wanted, step)
  return Run(config, step, restored["params"], restored["buffers"], tokenizer, mesh, meta["data_fingerprint"],
             router)
