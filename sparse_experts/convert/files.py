"""Folders of safetensors files, read tensor by tensor and written as they go.

A file is eight bytes (length of the header, little-endian), the header (JSON: name -> dtype, shape and place
of its data) and the data. The `safetensors` library judges a file before a tensor is read; it does not write,
for which it needs all tensors of a file in memory.
"""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from sparse_experts import storage
from sparse_experts.convert import eight_bits
from sparse_experts.errors import UserError

DTYPES = {name: jnp.dtype(dtype) for name, dtype in {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "I32": "int32",
    "I64": "int64", "U8": "uint8"}.items()}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# Fields of config.json that count layers, each of which has tensors, and those that are a length of a tensor
# or a part of one.
LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers")
SIZES = ("vocab_size", "hidden_size", "d_model", "intermediate_size", "moe_intermediate_size", "d_ff",
         "shared_expert_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts",
         "n_shared_experts", "num_experts_per_tok", "num_attention_heads", "num_key_value_heads", "num_heads",
         "head_dim", "d_kv", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
         "v_head_dim")
MAX_HEADER = 100_000_000  # bytes of a header or of a JSON file, as the library has it


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
    self.scales: dict[str, Tensor] = {}
    self.rule = eight_bits.Rule()

  def scale_by(self, rule: eight_bits.Rule) -> None:
    """Pairs 8-bit tensors with their scales, which leave `tensors`."""
    self.rule, self.scales = rule, eight_bits.pair(self.tensors, rule, self.path)

  def check_sizes(self, content: dict[str, Any]) -> None:
    """Refuses a config.json with sizes that no tensor here could have, before anything is made of them."""
    full = [t.shape for t in self.tensors.values() if 0 not in t.shape]
    longest, count = max((max(shape, default=1) for shape in full), default=0), len(self.tensors)
    for names, most, what in ((LAYERS, count, f"{self.path} holds {count:,} tensors, fewer than layers"),
                              (SIZES, longest, f"no tensor of {self.path} is longer than {longest:,}")):
      for name in names:
        if type(size := content.get(name)) is int and size > most:
          raise UserError(f"{os.path.join(self.path, CONFIG)}: {name}={size}, but {what}; fetch both again")

  def check_parameters(self, wanted: int) -> None:
    """Refuses far more parameters than the files hold; which are missing is then not worth a list."""
    there = sum(math.prod(t.shape) for t in self.tensors.values())
    if wanted > 2 * there:
      raise UserError(f"{os.path.join(self.path, CONFIG)} asks for {wanted:,} parameters, but the tensors "
                      f"next to it hold {there:,}; fetch both again")

  def _names(self) -> list[str]:
    """The files that the index names, each a file of this folder."""
    index = os.path.join(self.path, INDEX)
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
      raise UserError(f"{index} has no weight_map of tensors and their files; fetch it again")
    for tensor, name in files.items():
      if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
        raise UserError(f"{index} has {tensor!r} in {name!r:.200}, which is no safetensors file of its "
                        "folder; files elsewhere are not read: put them next to the index, or fetch it again")
    return sorted(set(files.values()))

  def _files(self) -> Iterable[str]:
    at = lambda name: os.path.join(self.path, name)
    if os.path.exists(at(INDEX)):
      names = self._names()
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
    """The tensor, mapped; an 8-bit one with a scale in float32, in memory."""
    values = self.tensors[name].map()
    return eight_bits.scaled(values, self.scales[name].map(), self.rule) if name in self.scales else values


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
  """The tensors of one file. Raises UserError for a file that is cut off, damaged or none.

  The library refuses what the format does: offsets that are no numbers, overlap, leave a gap or the file, and
  a header nested too deeply. A name that stands in the header twice passes it, and is refused here.
  """
  damaged = lambda why: UserError(f"{path} is no whole safetensors file ({why}); fetch it again")
  if not os.path.isfile(path):
    raise damaged("it is no file")
  try:
    size = os.path.getsize(path)
    with open(path, "rb") as f:
      length = int.from_bytes(f.read(8), "little")
      if length > size - 8:
        raise damaged(f"its header of {length:,} bytes does not fit in {size:,}")
      if length > MAX_HEADER:
        raise damaged(f"its header has {length:,} bytes, of which {MAX_HEADER:,} are allowed")
      with safetensors.safe_open(path, framework="numpy"):
        header = json.loads(f.read(length), object_pairs_hook=_no_name_twice)
  except UserError:
    raise
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}); mend its permissions") from None
  except safetensors.SafetensorError as e:
    raise damaged(str(e).removeprefix("Error while deserializing header: ")[:200]) from None
  except ValueError as e:
    raise damaged(str(e)) from None
  tensors = {}
  header.pop("__metadata__", None)
  for name, entry in header.items():
    if entry["dtype"] not in DTYPES:
      raise UserError(f"{path}: {name} has type {entry['dtype']}; only {', '.join(DTYPES)} are read")
    start = 8 + length + entry["data_offsets"][0]
    tensors[name] = Tensor(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
  return tensors


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The object of a JSON text. Raises ValueError if it has a name twice, of which one would be ignored."""
  content = dict(pairs)
  if len(content) < len(pairs):
    (name, _), = collections.Counter(name for name, _ in pairs).most_common(1)
    raise ValueError(f"{name!r:.100} stands in it twice")
  return content


def read_json(path: str) -> dict:
  """The object in a JSON file. Raises UserError for a file that holds none, or one name twice."""
  try:
    if os.path.exists(path) and not os.path.isfile(path):
      raise UserError(f"{path} is no file; name the folder of a whole checkpoint")
    if os.path.getsize(path) > MAX_HEADER:
      raise UserError(f"{path} has more than {MAX_HEADER:,} bytes, which no such file has; fetch it again")
    with open(path, encoding="utf-8") as f:
      content = json.load(f, object_pairs_hook=_no_name_twice)
  except UserError:
    raise
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}); name the folder of a whole checkpoint") from None
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path} is not JSON ({e}); fetch it again") from None
  if not isinstance(content, dict):
    raise UserError(f"{path} holds no JSON object; fetch it again")
  return content
