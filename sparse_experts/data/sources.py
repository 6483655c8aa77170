"""Where documents come from: one interface over the embedded text, files, TFDS and anyone's function.

A document is `{"text": UTF-8 bytes, "domain": int}`; a source has a train and a valid sequence of them.
Everything is read into memory once, at the start.
"""

import dataclasses
import hashlib
import importlib
import numbers
import pathlib
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from sparse_experts.errors import UserError, call, nearest

_NAMES = ["embedded", "files:PATH", "tfds:NAME", "package.module:function"]
_EMBEDDED_VALID_BYTES = 1_000_000
# Not source text, or written by the build and different on every machine.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SKIPPED_STARTS = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents of both splits. `domains[d]` names domain d. Losses compare for equal fingerprints only."""

  train: Sequence[dict]
  valid: Sequence[dict]
  domains: tuple[str, ...]
  fingerprint: str


def open_source(config_data) -> Source:
  """The source `config_data.source` names, split by `config_data.valid_share`."""
  name = config_data.source
  kind, colon, rest = name.partition(":")
  if name == "embedded":
    documents, domains = embedded()
    return as_source(documents, config_data, domains, min_valid_bytes=_EMBEDDED_VALID_BYTES)
  if kind in ("files", "tfds") and not rest:
    raise UserError(f"data.source='{name}' names nothing; write files:PATH or tfds:NAME")
  if kind == "files":
    from sparse_experts.data.text import files
    documents, domains = files.read(rest)
    return as_source(documents, config_data, domains)
  if kind == "tfds":
    from sparse_experts.data import prepared
    documents, domains = prepared.read(rest, config_data.dir)
    return as_source(documents, config_data, domains)
  if not colon or not rest:
    raise UserError(f"data.source='{name}' is unknown" + nearest(name, _NAMES))
  return as_source(call_function(name, kind, rest, config_data), config_data)


def as_source(documents, config_data, domains: Sequence[str] = (), min_valid_bytes: int = 0,
              name: str | None = None) -> Source:
  """Anything with documents as a Source: a sequence, or an object with `.train` and `.valid`.

  Documents may also be plain bytes or str, of domain 0. A sequence is split here. `name` is what messages
  call it, `data.source` by default.
  """
  name = f"data.source='{config_data.source}'" if name is None else name
  if hasattr(documents, "train") and hasattr(documents, "valid"):
    train, valid = (_clean(getattr(documents, part), f"{name}.{part}") for part in ("train", "valid"))
    domains = getattr(documents, "domains", domains)
  else:
    train, valid = split(_clean(documents, name), config_data.valid_share, name, min_valid_bytes)
  for part, of in ((train, "training"), (valid, "validation")):
    if not part:
      raise UserError(f"{name} has no {of} documents; give it at least two with text, "
                      f"or another data.valid_share={config_data.valid_share:g}")
  number = 1 + max(d["domain"] for part in (train, valid) for d in part)
  domains = tuple(domains) or tuple(str(d) for d in range(number))
  return Source(train, valid, domains, _fingerprint(train, valid))


def split(documents: Sequence[dict], valid_share: float, name: str, min_valid_bytes: int = 0):
  """(train, valid): valid takes documents in the order of a hash of their text until it has its share.

  So the split does not depend on names, order or seeds, copies of a text stay on one side, and
  new documents move only the few at the border. The share is counted in bytes.
  """
  if not 0 < valid_share < 1:
    raise UserError(f"data.valid_share={valid_share:g} must be between 0 and 1, say 0.08; "
                    f"without it {name} has no validation documents")
  key_D = [hashlib.blake2b(d["text"], digest_size=8).digest() for d in documents]
  wanted = max(valid_share * sum(len(d["text"]) for d in documents), min_valid_bytes)
  chosen, size = set(), 0
  for i in sorted(range(len(documents)), key=key_D.__getitem__):
    if size >= wanted:
      break
    chosen.add(key_D[i])
    size += len(documents[i]["text"])
  if len(chosen) == len(set(key_D)):  # the last one was large: leave it to training
    chosen -= {max(chosen)} if chosen else set()
  train = [d for d, key in zip(documents, key_D, strict=True) if key not in chosen]
  return train, [d for d, key in zip(documents, key_D, strict=True) if key in chosen]


def embedded() -> tuple[list[dict], list[str]]:
  """The running Python's own standard library without tests, sorted; domains are its top-level packages."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  named = []
  for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
    parts = path.relative_to(root).parts
    if _SKIPPED_FOLDERS & set(parts[:-1]) or any(p.startswith(_SKIPPED_STARTS) for p in parts):
      continue
    try:
      text = path.read_bytes()
      text.decode()
    except (OSError, UnicodeDecodeError):
      continue
    if text:
      named.append((parts, text))
  if not named:
    raise UserError(f"data.source='embedded' found no Python source in '{root}'; use files:PATH")
  return with_domains(named)


def with_domains(named: Sequence[tuple[tuple[str, ...], bytes]]) -> tuple[list[dict], list[str]]:
  """Documents of (path parts, text) pairs; the first folder of a path is its domain, '.' if it has none."""
  folder_D = [parts[0] if len(parts) > 1 else "." for parts, _ in named]
  domains = sorted(set(folder_D))
  number = {folder: i for i, folder in enumerate(domains)}
  return [dict(text=text, domain=number[f]) for f, (_, text) in zip(folder_D, named, strict=True)], domains


def call_function(name: str, module: str, function: str, config_data):
  """What `package.module:function` gives for the config; `name` is what messages call it."""
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
  of = getattr(found, function)
  path = getattr(getattr(of, "__code__", None), "co_filename", module)
  return call(path, f"data.source='{name}'", lambda: of(config_data))


def _clean(documents, name: str) -> list[dict]:
  """A list of well-formed documents, empty ones left out; `name` is what messages call the source."""
  clean = []
  for i, d in look_up(documents, name, "document"):
    text, domain = (d.get("text"), d.get("domain", 0)) if isinstance(d, dict) else (d, 0)
    if not isinstance(text, bytes | str):
      what = f"has a 'text' of type {type(text).__name__}" if isinstance(d, dict) else (
          f"is of type {type(d).__name__}")
      raise UserError(f"{name}: document {i} {what}; give bytes, str, or a dict with 'text' and 'domain'")
    try:
      text = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as e:
      raise UserError(f"{name}: document {i} is no Unicode text ({e.reason}); give its bytes") from None
    if not isinstance(domain, numbers.Integral) or domain < 0:
      raise UserError(f"{name}: document {i} has domain {domain!r}; give a whole number from 0 on")
    if text:
      clean.append(dict(text=text, domain=int(domain)))
  return clean


def look_up(sequence, name: str, what: str) -> Iterator[tuple[int, Any]]:
  """(i, sequence[i]) of all; what goes wrong in a user's sequence is said with the number of the `what`."""
  if not (hasattr(sequence, "__len__") and hasattr(sequence, "__getitem__")):
    raise UserError(f"{name} gives {type(sequence).__name__}, without __len__ and __getitem__; give a list, "
                    "or an object with both")
  for i in range(len(sequence)):
    try:
      item = sequence[i]
    except Exception as e:
      at = traceback.extract_tb(e.__traceback__)[-1]
      raise UserError(f"{name}: {what} {i} raised {type(e).__name__}: {e} ({at.filename}:{at.lineno}); "
                      "mend it or leave it out") from e
    yield i, item


def _fingerprint(*splits: Sequence[dict]) -> str:
  total = hashlib.sha256()
  for documents in splits:
    total.update(b"split %d" % len(documents))
    for d in documents:
      total.update(b"%d %d " % (d["domain"], len(d["text"])))
      total.update(d["text"])
  return total.hexdigest()[:16]
