"""From a foreign checkpoint to a work directory, a tensor at a time.

Arrays are assembled in files next to the checkpoint until they are saved. So the disk holds the parameters
twice (in float32) for a while; memory holds one tensor, and one chunk of the save.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sparse_experts import full_disk, storage
from sparse_experts.config import ConfigDict, check_workdir, default_config
from sparse_experts.convert.fields import Fields
from sparse_experts.convert.files import CONFIG, Folder, read_json
from sparse_experts.convert.layouts import find_layout
from sparse_experts.convert.pieces import Piece, Shape
from sparse_experts.convert.staging import clear, make_staging
from sparse_experts.data import Tokenizer, Vocabulary, make_tokenizer
from sparse_experts.data.text.foreign import ForeignTokenizer
from sparse_experts.errors import UserError
from sparse_experts.models import build, names
from sparse_experts.tasks import task_of
from sparse_experts.training import identity
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints.checksums import add_to_checksum
from sparse_experts.training.checkpoints.mapped import save_mapped
from sparse_experts.training.state import TrainState
from sparse_experts.validation import validate

LENGTH = 512  # of rows, unless the model allows less; foreign files give the largest length, not the trained
TOKENIZERS = ("spiece.model", "tokenizer.model", "tokenizer.json")  # as hubs name them


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a conversion reports: the layout, and what was read and left out."""

  layout: str
  parameters: int
  ignored: list[str]
  tokenizer_words: str


def read(folder: str, workdir: str, override: Callable[[ConfigDict], None] = lambda config: None) -> Summary:
  """Converts the checkpoint in `folder`, a folder or an address, to a run at step 0 in `workdir`.

  override: changes the config before it is checked.
  """
  check_workdir(workdir)
  storage.check(folder, f"--from={folder}")
  with storage.fetched(folder) as here:
    try:
      return _read(here, folder, workdir, override)
    except UserError as e:
      if here == folder:
        raise
      raise UserError(str(e).replace(here, folder)) from None


def _read(folder: str, name: str, workdir: str, override: Callable[[ConfigDict], None]) -> Summary:
  """`read` of a folder of this machine, which was called `name`."""
  if storage.exists(os.path.join(workdir, "config.json")) and not _cut_off(workdir):
    raise UserError(f"workdir {workdir} holds a run; name another folder")
  foreign = Folder(folder)
  path = os.path.join(folder, CONFIG)
  layout, hf = find_layout(read_json(path), path)
  foreign.check_sizes(hf.content)
  foreign.scale_by(hf.scales())
  tokenizer, words = find_tokenizer(folder, hf("vocab_size"), hf.content.get("eos_token_id"))
  config = make_config(layout.read(hf), hf, tokenizer)
  if tokenizer.file:  # a run that goes on from this one finds it there
    config.data.tokenizer = os.path.join(workdir, "tokenizer.model")
  override(config)
  validate(config)
  wd.claim(workdir, config)
  abstract, shapes = abstract_model(config, tokenizer.vocab_size)
  foreign.check_parameters(sum(math.prod(shape) for shape in shapes.values()))
  pieces = layout.pieces(config, shapes, foreign.tensors).check()
  ignored = _compare(layout, config, foreign, pieces)
  clear(workdir)
  run = identity.read_id(workdir) or identity.new_id()
  with full_disk.naming(workdir), make_staging(workdir) as staging:
    state, arrays = _stage(staging, foreign, pieces, abstract)
    made = os.path.join(staging, "made")
    save_mapped(made, state, arrays,
                identity.describe(config, tokenizer, f"{layout.name} of {name}", run))
    wd.keep(workdir, config, tokenizer, identity.id_file(run))
    storage.deliver(made, wd.checkpoints(workdir))  # last: now it is a run
  size = sum(x.size for x in jax.tree.leaves(abstract["params"]))
  return Summary(layout.name, size, ignored, words)


def _cut_off(workdir: str) -> bool:
  """Whether all that is there is what a killed conversion wrote before its checkpoint."""
  return not any(map(storage.exists, (wd.checkpoints(workdir), wd.metrics(workdir))))


def make_config(model: dict[str, Any], hf: Fields, tokenizer: Vocabulary) -> ConfigDict:
  """The config of a run with that model; dropless in training too, but for the slots that Switch has."""
  config = default_config()
  positions = hf("max_position_embeddings")
  length = min(LENGTH, positions or LENGTH)
  with config.unlocked():
    dropless = {} if "capacity_slots" in model else dict(capacity_factor=0.0, eval_capacity_factor=0.0)
    config.model.update_from_flattened_dict(model | dropless | dict(
        group_size=length, context_length=positions))
  config.data.length, config.data.tokenizer = length, tokenizer.name
  if config.model.router.name == "top_k":  # one loss, of the tokens of all layers of a stack
    config.model.router.scope, config.train.layer_losses = "batch", "pooled"
  if model["name"] == "seq2seq":
    config.data.objective = "span_corruption"
    config.data.mean_span = 3.0
    # A group is a sequence there, in which slots are counted.
    config.model.decoder.group_size = task_of(config).row_lengths(tokenizer)["targets"]
  return config


def abstract_model(config: ConfigDict, vocab_size: int) -> tuple[dict[str, Any], dict[str, Shape]]:
  """(abstract params and buffers, {name: shape} of both)."""
  params, buffers = jax.eval_shape(build(config, vocab_size, "dropless").init, jax.random.key(0))
  abstract = {"params": params, "buffers": buffers}
  return abstract, names.state_shapes(abstract)


def find_tokenizer(folder: str, size: int, eos: Any = None) -> tuple[Tokenizer, str]:
  """(tokenizer, message): the folder's if the model has a row for each of its ids, else one of bare ids.

  eos: the model's `eos_token_id`, a number or several; None: the tokenizer's own.
  """
  ends = [i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int) and 0 <= i < size]
  facts = {"vocab_size": size} | ({"eos_id": ends[0]} if ends else {})
  reasons = []
  for path in filter(os.path.exists, (os.path.join(folder, name) for name in TOKENIZERS)):
    try:
      tokenizer = make_tokenizer(path)
      if tokenizer.vocab_size != size or isinstance(tokenizer, ForeignTokenizer):
        tokenizer = make_tokenizer(path, facts=facts)
      return tokenizer, f"tokenizer {path}"
    except UserError as e:
      reasons.append(str(e))
  why = "; ".join(reasons) or f"{folder} has none of {', '.join(TOKENIZERS)}, and other kinds are not read"
  return make_tokenizer(f"vocabulary:{size}"), f"prompts and answers are token ids: {why}"


def _compare(layout: Any, config: ConfigDict, foreign: Folder, pieces: Sequence[Piece]) -> list[str]:
  """Names of tensors that are not needed. Refuses tensors that are missing, unknown or of another shape."""
  wanted = {piece.foreign: piece for piece in pieces}
  there = foreign.tensors
  ignored = [name for name in there if name not in wanted and layout.ignored(name, config)]
  wrong = {
      "missing": [name for name, piece in wanted.items() if name not in there and not piece.spare],
      "not known": [name for name in there if name not in wanted and name not in set(ignored)],
      "of another shape": [
          f"{name} {list(there[name].shape)}, not {list(piece.shape)}" for name, piece in wanted.items()
          if name in there and there[name].shape != piece.shape],
      "of whole numbers": [name for name in wanted
                           if name in there and not jnp.issubdtype(there[name].dtype, jnp.floating)]}
  if any(wrong.values()):
    raise UserError(f"{foreign.path} is no {layout.name} checkpoint as its config.json has it: "
                    + "; ".join(f"{len(f)} {what} ({some(f)})" for what, f in wrong.items() if f)
                    + "; fetch its files again, or mend config.json")
  return ignored


def some(items: Sequence[str], most: int = 3) -> str:
  return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _stage(folder: str, foreign: Folder, pieces: Sequence[Piece], abstract: dict[str, Any],
           ) -> tuple[TrainState, dict[str, list]]:
  """(the state in files of `folder`, its arrays' shapes, types and checksums).

  A block of a parameter, one expert's matrix, is read, checked and written to its place.
  """
  places, arrays = names.state_places(abstract), names.by_path(abstract)
  mapped = {key: full_disk.mapped(os.path.join(folder, str(i)), np.float32, x.shape)
            for i, (key, x) in enumerate(arrays.items())}
  blocks = collections.defaultdict(list)
  for piece in pieces:
    if not piece.spare or piece.foreign in foreign.tensors:
      blocks[piece.own, piece.block].append(piece)

  sums, not_finite = dict.fromkeys(arrays, 0), []
  for (own, index), parts in blocks.items():
    place = places[own]
    at: tuple[Any, ...] = index if place.repeat is None else (place.repeat, *index)
    block = mapped[place.path][(*at, ...)]
    for piece in sorted(parts, key=lambda piece: piece.copy):
      values, target = piece.of(foreign.read(piece.foreign)), block[piece.at[len(index):]]
      if not piece.copy:
        target[...] = values
      elif not np.array_equal(target, values):
        raise UserError(f"{foreign.path}: {piece.foreign} differs from {parts[0].foreign}, but the model has "
                        "one table for both; save the checkpoint again")
      if not np.isfinite(target).all():
        not_finite.append(piece.foreign)
    first = int(np.ravel_multi_index(at, arrays[place.path].shape[:len(at)])) * block.size if at else 0
    sums[place.path] = add_to_checksum(sums[place.path], block, first)
  if not_finite:
    tensors = list(dict.fromkeys(not_finite))
    raise UserError(f"{foreign.path}: {len(tensors)} tensors hold values that are not finite "
                    f"({some(tensors)}); fetch them again, or take a checkpoint from before")

  tree = {"buffers": {}} | traverse_util.unflatten_dict(mapped)
  state = TrainState(np.zeros((), np.int32), tree["params"], tree["buffers"], ())
  facts = {"/".join(key): [list(x.shape), "float32", sums[key]] for key, x in arrays.items()}
  return state, {"step": [[], "int32", 0], **facts}
