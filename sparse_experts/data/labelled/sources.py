"""Where labelled texts come from: tables in files, TFDS and anyone's function.

A labelled text is `{"text": UTF-8 bytes, "label": int}`; a `Source` has the words of labels in `domains`.
"""

import functools
import logging
import numbers
from collections.abc import Sequence
from typing import Any

from sparse_experts.data import prepared
from sparse_experts.data.labelled import files
from sparse_experts.data.sources import (
  Source,
  called,
  fingerprint,
  items_of,
  open_named,
  split_by_class,
  two_parts,
)
from sparse_experts.errors import UserError, nearest


def open_source(config_data, strict: bool = True) -> Source:
  """The source `config_data.source` names; without a validation part, `valid_share` of each label is.

  strict: refuses words for labels none of which it has.
  """
  if config_data.source == "embedded":
    raise UserError("data.source='embedded' has no labels; give files:PATH of a table of texts and labels, "
                    "tfds:NAME or package.module:function")
  texts, labels = open_named(config_data, {
      "files:PATH": files.read, "tfds:NAME": functools.partial(prepared.read, directory=config_data.dir)})
  source = as_source(texts, config_data, labels, strict=strict)
  if len(source.domains) < 2:
    raise UserError(f"data.source='{config_data.source}' has one label only, '{source.domains[0]}'; give it "
                    "two or more")
  return source


def as_source(texts: Any, config_data, labels: Sequence[str] = (), name: str | None = None,
              strict: bool = True) -> Source:
  """Anything with labelled texts as a Source: a sequence, or an object with `.train` and `.valid`.

  A labelled text is a pair (text, label) or a dict with 'text' and 'label'; a label is a name, or a number in
  `labels` or the object's `.domains`. `name` is what messages call it.
  """
  name = called(config_data, name)
  names = tuple(getattr(texts, "domains", labels))
  train, valid = two_parts(
      texts, config_data, name, functools.partial(_clean, labels=names), split, items="labelled texts",
      wanted="at least two of a label")
  there = {item["label"] for part in (train, valid) for item in part}
  words_of = words(config_data.label_words, there, name, strict)
  domains = tuple(sorted(set(words_of.values())))
  number = {label: domains.index(of) for label, of in words_of.items()}
  train, valid = ([dict(item, label=number[item["label"]]) for item in part] for part in (train, valid))
  content = lambda item: f"{domains[item['label']]} {len(item['text'])} ".encode() + item["text"]
  return Source(train, valid, domains, fingerprint("labelled", (train, valid), content))


def split(texts: Sequence[dict], valid_share: float, name: str) -> tuple[list[dict], list[dict]]:
  """(train, valid): of each label the texts whose hashes are smallest, `valid_share` of them, at least one.

  So the split does not depend on names, order or seeds, and copies of a text stay on one side.
  """
  return split_by_class(texts, lambda item: item["text"], valid_share)


def words(renamed: str, labels: set[str], name: str = "", strict: bool = True) -> dict[str, str]:
  """{label: its words}: those of 'label=words,...', else the label with _ as a space; two may share words.

  Labels that are not there are logged, as they may be another source's; if none is there, strict refuses it.
  """
  found = {label: label.replace("_", " ").strip() for label in labels}
  given: dict[str, str] = {}
  for pair in filter(None, map(str.strip, renamed.split(","))):
    label, equals, its = (part.strip() for part in pair.partition("="))
    if not equals or not label or not its:
      raise UserError(f"data.label_words='{renamed}': '{pair}' is not LABEL=WORDS; write for example "
                      "data.label_words='pos=positive,neg=negative'")
    given[label] = its
  unknown = [label for label, its in given.items() if label not in labels and its not in labels]
  if labels and unknown:
    why = f"data.label_words='{renamed}': {name} has no label '{unknown[0]}'{nearest(unknown[0], labels)}"
    if strict and len(unknown) == len(given):
      raise UserError(why)
    logging.warning("%s", why)
  return found | {label: its for label, its in given.items() if label in found}


def _clean(texts: Any, name: str, labels: Sequence[str]) -> list[dict]:
  """A list of well-formed labelled texts, empty ones left out; `name` is what messages call the source."""
  clean = []
  for i, item in items_of(texts, name, "labelled text"):
    if isinstance(item, dict):
      text, label = item.get("text"), item.get("label", item.get("domain"))
    else:
      text, label = item if isinstance(item, tuple | list) and len(item) == 2 else (None, None)
    if not isinstance(text, bytes | str) or not isinstance(label, str | numbers.Integral):
      raise UserError(f"{name}: labelled text {i} is not a text with a label; give (text, label), or a dict "
                      "with 'text' and 'label'")
    if isinstance(label, numbers.Integral):
      if labels and int(label) not in range(len(labels)):
        raise UserError(f"{name}: labelled text {i} has label {label}, but there are {len(labels)}; name "
                        "them all, or mend the label")
      label = labels[int(label)] if labels else str(label)
    try:
      text = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as e:
      raise UserError(f"{name}: labelled text {i} is no Unicode text ({e.reason}); give its bytes") from None
    if not label.strip():
      raise UserError(f"{name}: labelled text {i} has an empty label; name it")
    if text.strip():
      clean.append(dict(text=text, label=label))
  return clean
