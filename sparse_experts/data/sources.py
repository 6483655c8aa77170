"""What all data sources share: their two parts, their name in a config, reading a user's own data."""

import dataclasses
import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sparse_experts.config import code_names
from sparse_experts.errors import UserError, call, nearest

Items = list[dict]


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents, images or pairs of both splits. Only runs of equal fingerprints have comparable losses.

  domains: names of the documents' domains, or of the images' classes, in order of their numbers.
  """

  train: Sequence[dict]
  valid: Sequence[dict]
  domains: tuple[str, ...]
  fingerprint: str

  def part(self, split: str) -> Sequence[dict]:
    """What is to train on, or held out: `split` is train or valid."""
    if split not in ("train", "valid"):
      raise UserError(f"split '{split}' is unknown" + nearest(split, ["train", "valid"]))
    return getattr(self, split)


def open_named(config_data, readers: dict[str, Callable[..., tuple[Any, Sequence[str]]]],
               ) -> tuple[Any, Sequence[str]]:
  """(data, names of domains or classes) of what `config_data.source` names.

  readers: how each form is read, such as {"embedded": read(), "files:PATH": read(path)}. Besides these,
  `package.module:function` calls that function with `config_data`.
  """
  name = config_data.source
  head, _, rest = name.partition(":")
  if name in readers:
    return readers[name]()
  with_argument = {form.partition(":")[0]: form for form in readers if ":" in form}
  if head in with_argument:
    if not rest:
      raise UserError(f"data.source='{name}' names nothing; write {' or '.join(with_argument.values())}")
    return readers[with_argument[head]](rest)
  if not rest:
    raise UserError(f"data.source='{name}' is unknown" + nearest(name, [*readers, "package.module:function"]))
  return _call_function(name, head, rest, config_data), ()


def _call_function(name: str, module: str, function: str, config_data) -> Any:
  """What the function returns; `name` is what messages call the source."""
  code_names.check(name)
  if module.partition(".")[0] in sys.stdlib_module_names:
    raise UserError(f"data.source='{name}' is of Python's standard library, which has no data; give a module "
                    "of your own, package.module:function")
  try:
    found = importlib.import_module(module)
  except ModuleNotFoundError as e:
    if e.name is None or not (module + ".").startswith(e.name + "."):
      raise  # the module is there and one of its own imports fails: its author needs the traceback
    raise UserError(f"data.source='{name}': there is no module '{module}'"
                    + nearest(module, ["embedded", "files", "tfds", "package.module"])) from e
  if not callable(getattr(found, function, None)):
    raise UserError(f"data.source='{name}': '{module}' has no function '{function}'"
                    + nearest(function, [n for n, f in vars(found).items() if callable(f) and n[0] != "_"]))
  read: Any = getattr(found, function)
  if not _is_source(read):
    raise UserError(f"data.source='{name}' is no function or class that takes config.data alone; write "
                    "def read(config_data)")
  path = getattr(getattr(read, "__code__", None), "co_filename", module)
  return call(path, f"data.source='{name}'", lambda: read(config_data))


def _is_source(f: Any) -> bool:
  """Whether it is a function or a class that can be called with one argument."""
  if not (inspect.isfunction(f) or inspect.isclass(f)):
    return False
  try:
    inspect.signature(f).bind(None)
  except (TypeError, ValueError):
    return False
  return True


def two_parts(data: Any, config_data, name: str, clean: Callable[[Any, str], Items],
              split: Callable[[Items, float, str], tuple[Items, Items]], *, items: str, wanted: str,
              least: int = 1) -> tuple[Items, Items]:
  """(train, valid) of an object with `.train` and `.valid`, or of a sequence that `split` cuts.

  name: what messages call the data. clean: (sequence, its name) -> its checked items, which messages call
  `items`. least: of each part, or the user is asked for what is `wanted`.
  """
  parts = ((clean(data.train, f"{name}.train"), clean(data.valid, f"{name}.valid"))
           if hasattr(data, "train") and hasattr(data, "valid")
           else split(clean(data, name), config_data.valid_share, name))
  for part, of in zip(parts, ("training", "validation"), strict=True):
    if len(part) < least:
      raise UserError(f"{name} has {len(part) or 'no'} {of} {items}; give it {wanted}, or another "
                      f"data.valid_share={config_data.valid_share:g}")
  return parts


def split_by_class(items: Sequence[dict], content: Callable[[dict], bytes],
                   share: float) -> tuple[list[dict], list[dict]]:
  """(train, valid) of items with a 'label': of each class those whose hashes are smallest are valid.

  They are `share` of a class's different items, at least one, and none of a class of one. So a split depends
  on neither names nor order nor seeds, and copies of an item, whose `content` is equal, stay on one side.
  """
  key_I = [hashlib.blake2b(content(item), digest_size=8).digest() for item in items]
  of_class: dict[Any, set[bytes]] = {}
  for key, item in zip(key_I, items, strict=True):
    of_class.setdefault(item["label"], set()).add(key)
  chosen = {key for its in of_class.values() if len(its) > 1
            for key in sorted(its)[:max(round(share * len(its)), 1)]}
  train = [item for item, key in zip(items, key_I, strict=True) if key not in chosen]
  return train, [item for item, key in zip(items, key_I, strict=True) if key in chosen]


def called(config_data, name: str | None) -> str:
  """What messages call the data: `name`, or the source that the config names."""
  return f"data.source='{config_data.source}'" if name is None else name


def items_of(sequence: Any, name: str, item: str) -> Iterator[tuple[int, Any]]:
  """(i, sequence[i]) of all items of a user's sequence; an error in it is reported with the item's number.

  item: what messages call one, such as "document".
  """
  if not (hasattr(sequence, "__len__") and hasattr(sequence, "__getitem__")):
    raise UserError(f"{name} gives {type(sequence).__name__}, without __len__ and __getitem__; give a list, "
                    "or an object with both")
  for i in range(len(sequence)):
    try:
      value = sequence[i]
    except Exception as e:
      at = traceback.extract_tb(e.__traceback__)[-1]
      raise UserError(f"{name}: {item} {i} raised {type(e).__name__}: {e} ({at.filename}:{at.lineno}); "
                      "mend it or leave it out") from e
    yield i, value


def fingerprint(word: str, parts: Iterable[Sequence[dict]], content: Callable[[dict], bytes]) -> str:
  """A hash of all items of all parts, in order; `content` gives the bytes of one."""
  total = hashlib.sha256()
  for part in parts:
    total.update(f"{word} {len(part)}".encode())
    for item in part:
      total.update(content(item))
  return total.hexdigest()[:16]
