"""The reference checkpoints (make_reference.py), and the same tensors written in other ways."""

import json
import pathlib
import shutil

import numpy as np

from sparse_experts.convert.files import CONFIG, FILE, Folder, read_header, write_tensors

DATA = pathlib.Path(__file__).parent / "data"
NAMES = sorted(path.name for path in DATA.iterdir())


def tensors(folder):
  """Name -> values, of any folder of safetensors."""
  return {name: np.array(tensor.map()) for name, tensor in Folder(str(folder)).tensors.items()}


def reference(name):
  """(the batch that transformers was given, its logits)."""
  found = read_header(str(DATA / name / "reference.safetensors"))
  r = {key: np.array(tensor.map()) for key, tensor in found.items()}
  places = lambda ids: np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
  ids = r.get("decoder_ids", r["ids"])
  batch = {"decoder_inputs": ids, "segments": np.ones(ids.shape, np.int32), "positions": places(ids)}
  if "decoder_ids" in r:
    batch |= {"encoder_inputs": r["ids"], "encoder_segments": r["mask"],
              "encoder_positions": places(r["ids"])}
  return batch, r["logits"]


def save(folder, arrays, config, max_bytes=10**9):
  """A checkpoint of these tensors; what they are, nobody checks."""
  folder.mkdir(parents=True, exist_ok=True)
  specs = {name: (a.dtype, a.shape) for name, a in arrays.items()}
  write_tensors(str(folder), specs, arrays.__getitem__, max_bytes)
  (folder / CONFIG).write_text(json.dumps(config))
  return folder


def config_of(name):
  return json.loads((DATA / name / CONFIG).read_text())


def changed(name, folder, tensor=None, config=None):
  """A copy of a reference checkpoint with tensors and config fields changed; None takes one away."""
  arrays = tensors(DATA / name) | (tensor or {})
  fields = config_of(name) | (config or {})
  return save(folder, {key: a for key, a in arrays.items() if a is not None},
              {key: value for key, value in fields.items() if value != "absent"})


def copy(name, folder):
  folder.mkdir()
  for file in (CONFIG, FILE):
    shutil.copy(DATA / name / file, folder / file)
  return folder
