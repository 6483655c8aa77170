"""Folders of safetensors files, read tensor by tensor and written as they go.

A file is eight bytes (length of the header, little-endian), the header (JSON: name -> dtype, shape and place
of its data) and the data. The `safetensors` library is not used: it needs all tensors of a file in memory
to write it.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_experts import storage
from sparse_experts.errors import UserError

DTYPES = {name: jnp.dtype(dtype) for name, dtype in {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "I32": "int32",
    "I64": "int64"}.items()}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SCALE, SCALE_BLOCK = "_scale_inv", 128  # DeepSeek-V3's: a factor for each block of an 8-bit matrix


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Location and type of a tensor in a file."""

  path: str
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  def map(self) -> np.ndarray:
    """Its values as a memory map."""
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    return np.memmap(self.path, self.dtype, "r", self.start, self.shape)


class Folder:
  """The tensors of a folder by name, of one file or of those that an index names."""

  def __init__(self, folder: str):
    if not os.path.isdir(folder):
      raise UserError(f"--from={folder} is no folder; name one that holds config.json and {FILE}")
    self.path = folder
    self.tensors: dict[str, Tensor] = {}
    for path in self._files():
      found = read_header(path)
      if twice := found.keys() & self.tensors.keys():
        name = min(twice)
        raise UserError(f"{name} is in {self.tensors[name].path} and in {path}; remove the file that is not "
                        "of this checkpoint")
      self.tensors |= found
    self.scales = {name.removesuffix(SCALE): self.tensors.pop(name) for name in list(self.tensors)
                   if name.endswith(SCALE) and name.removesuffix(SCALE) in self.tensors}

  def _files(self) -> Iterable[str]:
    at = lambda name: os.path.join(self.path, name)
    if os.path.exists(at(INDEX)):
      names = sorted(set(read_json(at(INDEX)).get("weight_map", {}).values()))
      for name in names:
        if not os.path.isfile(at(name)):
          raise UserError(f"{at(INDEX)} names {name}, which is not there; fetch the missing file")
      if os.path.exists(at(FILE)) and FILE not in names:
        raise UserError(f"{self.path} holds both {FILE} and {INDEX}, which names {', '.join(names[:3])}"
                        f"{', ...' * (len(names) > 3)}: two checkpoints; remove the one that is not meant")
      return [at(name) for name in names]
    if os.path.exists(at(FILE)):
      return [at(FILE)]
    pickles = sorted(n for n in os.listdir(self.path) if n.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
      raise UserError(f"{at(pickles[0])} is a pickle, which can run code when it is read; save the model as "
                      "safetensors, in transformers model.save_pretrained(DIR, safe_serialization=True)")
    raise UserError(f"{self.path} holds neither {FILE} nor {INDEX}; name the folder of a checkpoint")

  def read(self, name: str) -> np.ndarray:
    """The tensor, mapped; an 8-bit one with scales in float32, in memory."""
    tensor = self.tensors[name]
    if tensor.dtype.itemsize > 1:
      return tensor.map()
    values = tensor.map().astype(np.float32)
    scale = self.scales[name].map()
    for row in range(scale.shape[0]):
      rows = values[row * SCALE_BLOCK:(row + 1) * SCALE_BLOCK]
      rows *= np.repeat(scale[row], SCALE_BLOCK)[:values.shape[1]]
    return values


def write_tensors(folder: str, specs: dict[str, tuple[np.dtype, tuple[int, ...]]],
                  make: Callable[[str], np.ndarray], max_bytes: int) -> None:
  """Writes the tensors {name: (dtype, shape)} into files of at most `max_bytes`; several get an index.

  make: the array of that name, called in order, one at a time. A tensor larger than `max_bytes` has its own
    file.
  """
  size = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in specs.items()}
  files: list[list[str]] = [[]]
  room = max_bytes
  for name in specs:
    if files[-1] and size[name] > room:
      files.append([])
      room = max_bytes
    files[-1].append(name)
    room -= size[name]
  n, index = len(files), dict[str, str]()
  for i, names in enumerate(files):
    file = FILE if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"
    index |= dict.fromkeys(names, file)
    with storage.create(os.path.join(folder, file)) as f:
      f.write(_header(names, specs, size))
      for name in names:
        array = make(name)
        if (array.dtype, array.shape) != specs[name]:
          raise ValueError(f"wanted {name} {specs[name]}, got {array.dtype} {array.shape}")
        f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  if n > 1:
    storage.write_json(os.path.join(folder, INDEX), {
        "metadata": {"total_size": sum(size.values())}, "weight_map": index})


def _header(names: list[str], specs: dict[str, tuple[np.dtype, tuple[int, ...]]],
            size: dict[str, int]) -> bytes:
  """The begin of a file that holds these tensors."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  start = 0
  for name in names:
    dtype, shape = specs[name]
    header[name] = {"dtype": NAMES[dtype.name], "shape": list(shape),
                    "data_offsets": [start, start + size[name]]}
    start += size[name]
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text


def read_header(path: str) -> dict[str, Tensor]:
  """The tensors of one file. Raises UserError for a file that is cut off or is none."""
  damaged = lambda why: UserError(f"{path} is no whole safetensors file ({why}); fetch it again")
  try:
    size = os.path.getsize(path)
    with open(path, "rb") as f:
      length = int.from_bytes(f.read(8), "little")
      text = f.read(length) if length <= size - 8 else None
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}); mend its permissions") from None
  if text is None:
    raise damaged(f"its header of {length:,} bytes does not fit in {size:,}")
  try:
    header = dict(json.loads(text))
  except (TypeError, ValueError):
    raise damaged("its header is not JSON") from None
  tensors = {}
  header.pop("__metadata__", None)
  for name, entry in header.items():
    try:
      dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
      raise damaged(f"of {name} it does not say type, shape and place") from None
    if dtype not in DTYPES:
      raise UserError(f"{path}: {name} has type {dtype}; only {', '.join(DTYPES)} are read")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize or 8 + length + stop > size:
      raise damaged(f"{name} does not lie in it whole")
    tensors[name] = Tensor(path, DTYPES[dtype], shape, 8 + length + start)
  return tensors


def read_json(path: str) -> dict:
  try:
    with open(path, encoding="utf-8") as f:
      content = json.load(f)
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}); name the folder of a whole checkpoint") from None
  except ValueError as e:
    raise UserError(f"{path} is not JSON ({e}); fetch it again") from None
  if not isinstance(content, dict):
    raise UserError(f"{path} holds no JSON object; fetch it again")
  return content
