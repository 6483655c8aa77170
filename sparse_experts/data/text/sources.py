"""Where documents come from: the embedded text, files, TFDS and anyone's function.

A document is `{"text": UTF-8 bytes, "domain": int}`; a source has a train and a valid sequence of them.
Everything is read into memory once, at the start.
"""

import functools
import hashlib
import numbers
import pathlib
import sysconfig
from collections.abc import Sequence

from sparse_experts.config.mixture import HEAD
from sparse_experts.data import prepared
from sparse_experts.data.sources import Source, called, fingerprint, items_of, open_named, two_parts
from sparse_experts.data.text import files, mixture
from sparse_experts.errors import UserError

_EMBEDDED_VALID_BYTES = 1_000_000
# Not source text, or written by the build and different on every machine.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SKIPPED_STARTS = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")


def open_source(config_data) -> Source:
  """The source `config_data.source` names; if it has no validation part, `valid_share` is held out."""
  if config_data.source.startswith(HEAD):
    return mixture.open_source(config_data, open_source)
  documents, domains = open_named(config_data, {
      "embedded": embedded, "files:PATH": files.read,
      "tfds:NAME": functools.partial(prepared.read, directory=config_data.dir)})
  return as_source(documents, config_data, domains,
                   min_valid_bytes=_EMBEDDED_VALID_BYTES if config_data.source == "embedded" else 0)


def as_source(documents, config_data, domains: Sequence[str] = (), min_valid_bytes: int = 0,
              name: str | None = None) -> Source:
  """Anything with documents as a Source: a sequence, or an object with `.train` and `.valid`.

  Documents may also be plain bytes or str, of domain 0. A sequence is split here. `name` is what messages
  call it, `data.source` by default.
  """
  train, valid = two_parts(
      documents, config_data, called(config_data, name), _clean,
      functools.partial(split, min_valid_bytes=min_valid_bytes), items="documents",
      wanted="at least two with text")
  number = 1 + max(d["domain"] for d in (*train, *valid))
  domains = tuple(getattr(documents, "domains", domains)) or tuple(map(str, range(number)))
  content = lambda d: b"%d %d " % (d["domain"], len(d["text"])) + d["text"]
  return Source(train, valid, domains, fingerprint("split", (train, valid), content))


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
  return files.with_domains(named)


def _clean(documents, name: str) -> list[dict]:
  """A list of well-formed documents, empty ones left out; `name` is what messages call the source."""
  clean = []
  for i, d in items_of(documents, name, "document"):
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
