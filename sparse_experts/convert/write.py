"""From a run to a foreign checkpoint, a tensor at a time.

The arrays are copied out of the run's checkpoint into files first, since a tensor lies in several of them or
is a part of one; they take as much disk as the parameters, in addition to what is written.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_experts import full_disk, storage
from sparse_experts.config import ConfigDict, flat, read_config
from sparse_experts.convert.fields import outputs_depend_on
from sparse_experts.convert.files import CONFIG, write_tensors
from sparse_experts.convert.layouts import LAYOUTS, fields_of, get_layout
from sparse_experts.convert.read import abstract_model, make_config, some
from sparse_experts.convert.staging import clear, make_staging
from sparse_experts.data import Tokenizer, Vocabulary
from sparse_experts.data.text.tokenizer import NO_ID
from sparse_experts.errors import UserError, nearest
from sparse_experts.models import names
from sparse_experts.training import identity
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Steps
from sparse_experts.training.checkpoints.mapped import restore_mapped

WRITTEN = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5 * 10**9
ALWAYS_FLOAT32 = "e_score_correction_bias"  # as DeepSeek-V3's files, whatever the others are


Specs = dict[str, tuple[np.dtype, tuple[int, ...]]]  # tensors by name: type and shape
Make = Callable[[str, dict[str, np.ndarray]], np.ndarray]  # (name, the run's arrays) -> that tensor


def write(workdir: str, folder: str, layout_name: str, *, step: int | None = None, dtype: str = "float32",
          shard_bytes: int = SHARD_BYTES) -> int:
  """Writes the run's weights to a new folder; returns their step.

  Refuses a model that the layout cannot hold, naming the key. Values are rounded to `dtype`.
  """
  layout = get_layout(layout_name, "--layout=")
  if dtype not in WRITTEN:
    raise UserError(f"--dtype='{dtype}' is unknown{nearest(dtype, WRITTEN)}")

  def plan(config: ConfigDict, shapes: dict[str, Any], fields: dict[str, Any]) -> tuple[Specs, Make]:
    by_foreign: dict[str, list] = {}
    for piece in layout.pieces(config, shapes).check():
      if not piece.spare:
        by_foreign.setdefault(piece.foreign, []).append(piece)
    specs = {name: (jnp.dtype("float32" if name.endswith(ALWAYS_FLOAT32) else dtype), parts[0].shape)
             for name, parts in by_foreign.items()}

    def make(name: str, own: dict[str, np.ndarray]) -> np.ndarray:
      made = np.empty(specs[name][1], np.float32)
      for piece in by_foreign[name]:
        piece.of(made)[...] = own[piece.own][piece.at]
      with np.errstate(over="ignore"):
        return made.astype(specs[name][0], copy=False)

    return specs, make

  return export(workdir, folder, step, shard_bytes,
                lambda config, tokenizer: foreign_config(layout, config, tokenizer, dtype), plan)


def export(workdir: str, folder: str, step: int | None, shard_bytes: int,
           make_fields: Callable[[ConfigDict, Vocabulary], dict[str, Any]],
           plan: Callable[[ConfigDict, dict[str, Any], dict[str, Any]], tuple[Specs, Make]]) -> int:
  """Writes tensors made of a run's arrays, and a config.json, to a new folder; returns the step.

  make_fields: of config.json; refuses a run that is not to be written. plan: from the config, the shapes of
  the run's arrays and those fields, which it may complete, the tensors and what makes each from the arrays.
  """
  storage.check(folder, f"--to={folder}")
  clear(folder)
  if storage.exists(folder) and (not storage.is_folder(folder) or storage.names(folder)):
    raise UserError(f"--to={folder} is there and not empty; name a new folder")
  config = read_config(workdir)
  tokenizer = wd.read_tokenizer(workdir, config)
  if tokenizer is None:
    raise UserError(f"workdir {workdir} has no tokenizer.model; train the run first, or name another workdir")
  fields = make_fields(config, tokenizer)
  steps = Steps(wd.checkpoints(workdir))
  step = steps.choose(step)
  identity.check(steps, step, workdir, config, tokenizer)
  abstract, shapes = abstract_model(config, tokenizer.vocab_size)
  specs, make = plan(config, shapes, fields)

  steps.refuse_others(abstract, step)
  try:
    storage.make_folders(folder)
    staging = make_staging(folder)
  except OSError as e:
    raise UserError(f"--to={folder} cannot be written ({e.strerror}); choose another folder") from None
  with _leaving_nothing(folder), staging as copies:
    own, not_finite = _restore(steps, abstract, step, copies), dict[str, str]()

    def checked(name: str) -> np.ndarray:
      made = make(name, own)
      if not np.isfinite(made).all():
        not_finite[name] = made.dtype.name
      return made

    whole = os.path.join(copies, "whole")
    os.mkdir(whole)
    write_tensors(whole, specs, checked, shard_bytes)
    if not_finite:
      dtype = next(iter(not_finite.values()))
      raise UserError(f"{len(not_finite)} tensors of {workdir} hold values that are not finite in {dtype} "
                      f"({some(list(not_finite))}); choose another step, or --dtype=float32")
    if isinstance(tokenizer, Tokenizer) and tokenizer.file:
      storage.write(os.path.join(whole, tokenizer.file), tokenizer.model)
      ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
      fields |= {name: None if i == NO_ID else i for name, i in ids.items()}
    storage.write_json(os.path.join(whole, CONFIG), fields)
    for name in sorted(os.listdir(whole), key=lambda name: name == CONFIG):  # it comes last
      storage.deliver(os.path.join(whole, name), os.path.join(folder, name))
  return step


@contextlib.contextmanager
def _leaving_nothing(folder: str) -> Iterator[None]:
  """Removes the folder, which is empty again, after an error; a full disk is that of `folder`."""
  try:
    with full_disk.naming(folder):
      yield
  except BaseException:
    with contextlib.suppress(OSError):
      os.rmdir(folder)
    raise


def _restore(steps: Steps, abstract: dict[str, Any], step: int,
             folder: str) -> dict[str, np.ndarray]:
  """{name: parameter or buffer of one layer}, copied to files of `folder` and mapped."""
  arrays = restore_mapped(steps, tuple(abstract), step, folder)
  whole = lambda place: arrays["/".join(place.path)]
  return {name: whole(place) if place.repeat is None else whole(place)[place.repeat]
          for name, place in names.state_places(abstract).items()}


def foreign_config(layout: Any, config: ConfigDict, tokenizer: Vocabulary, dtype: str) -> dict[str, Any]:
  """The layout's config.json. Refuses a config that would not be read back as the same model."""
  cannot = lambda key, ours, theirs: UserError(
      f"--layout={layout.name} cannot hold model.{key}={ours!r}, only {theirs!r}; choose another layout of "
      f"{', '.join(sorted(LAYOUTS))}, or train a model that fits")
  ours = outputs_depend_on(config)
  family = config.model.name
  if family != layout.needs["name"]:
    fitting = sorted(name for name, other in LAYOUTS.items() if other.needs["name"] == family)
    way_out = f"choose --layout={' or '.join(fitting)}" if fitting else (
        "no layout holds such a model: they are of decoders and encoder-decoders of text")
    raise UserError(f"--layout={layout.name} cannot hold model.name={family!r}, only "
                    f"{layout.needs['name']!r}; {way_out}")
  for key, wanted in layout.needs.items():
    if ours[key] != wanted:
      raise cannot(key, ours[key], wanted)
  if not any(ours["moe_layers"].values()):
    raise cannot("num_experts", config.model.num_experts, "a sparse model")
  if layout.shared and not config.model.shared_experts:
    raise cannot("shared_experts", 0, "1 or more")
  rope = config.model.rope
  trained = int(rope.factor * rope.original_length) if rope.factor > 1 else config.data.length
  length = config.model.context_length or trained
  fields = {"architectures": [layout.architecture], "model_type": layout.name, "torch_dtype": dtype,
            "vocab_size": tokenizer.vocab_size, "max_position_embeddings": length,
            **layout.write(flat(config.model) | ours)}
  hf = fields_of(layout, fields, f"--layout={layout.name}")
  theirs = outputs_depend_on(make_config(layout.read(hf), hf, tokenizer))
  for stack, layers in ours["moe_layers"].items():  # first: other keys depend on it
    if layers != theirs["moe_layers"][stack]:
      key = "decoder.moe_layers" if (len(ours["moe_layers"]), stack) == (2, "decoder") else "moe_layers"
      raise cannot(key, layers, theirs["moe_layers"][stack])
  for key in sorted(ours.keys() | theirs.keys()):
    if ours.get(key) != theirs.get(key):
      raise cannot(key, ours.get(key), theirs.get(key))
  return fields
