"""Renders the package's docstrings, which are plain text, as reStructuredText.

A docstring has paragraphs; lists with `- `; indented tables and code, shown as they stand; and lines such as
`name: what it is`, continued by indented lines, which become a list of definitions. Papers are linked.
"""

import re
from collections.abc import Iterator

import papers

# `name: text` or `name, other: text` at the margin: an argument, a field or a key.
TERM = re.compile(r"(`?[a-z_][\w.]*`?(?:, `?[a-z_][\w.]*`?)*): (?=\S)(.*)")
CODE = re.compile(r"(``.+?``|`.+?`)")
SPECIAL = re.compile(r"([\\*|]|(?<=\w)_(?!\w))")


def process(app, what, name, obj, options, lines: list[str]) -> None:
  """Sphinx's `autodoc-process-docstring`: changes `lines` in place."""
  lines[:] = render(lines)


def module_signature(app, what, name, obj, options, arguments: str | None, returned: str | None):
  """Sphinx's `autodoc-process-signature`: a flax module's class takes what its constructor takes."""
  from flax import nnx
  from sphinx.util.inspect import signature, stringify_signature

  if what != "class" or not issubclass(obj, nnx.Module) or obj.__init__ is object.__init__:
    return None
  own = signature(obj.__init__, bound_method=True)
  return stringify_signature(own, show_return_annotation=False, unqualified_typehints=True), None


def render(lines: list[str]) -> list[str]:
  """The docstring's lines as reStructuredText."""
  result: list[str] = []
  for number, block in enumerate(_blocks(lines)):
    result += [*_block(block, is_summary=number == 0), ""]
  return result


def inline(text: str) -> str:
  """Text with code as literals, papers as links, and signs that reStructuredText reads taken as they are."""
  parts = CODE.split(text)
  parts[::2] = [papers.link(SPECIAL.sub(r"\\\1", part), "`{text} <{url}>`__") for part in parts[::2]]
  # A literal must be followed by a space or punctuation: `slots`' becomes a literal and an escaped end.
  parts[1::2] = [f"``{part.strip('`')}``" for part in parts[1::2]]
  for i in range(1, len(parts), 2):
    if parts[i + 1][:1].isalnum():
      parts[i + 1] = "\\ " + parts[i + 1]
    if parts[i - 1][-1:].isalnum():
      parts[i - 1] += "\\ "
  return "".join(parts)


def _blocks(lines: list[str]) -> Iterator[list[str]]:
  """Lines between blank ones; indented blocks that follow each other are one."""
  block: list[str] = []
  for line in [*lines, ""]:
    if line.strip():
      block.append(line)
    elif block:
      yield block
      block = []


def _block(block: list[str], is_summary: bool) -> list[str]:
  if block[0].startswith("  "):
    return ["::", "", *(f"    {line}" for line in block)]
  result: list[str] = []
  for item in _items(block):
    head, *more = (line.strip() for line in item)
    term = None if is_summary else TERM.fullmatch(item[0])
    if term:
      names, text = term.groups()
      names = ", ".join(f"``{name.strip('`')}``" for name in names.split(", "))
      result += ["", names, "    " + inline(" ".join([text, *more]))]
    elif head.startswith("- "):
      result += ["", "- " + inline(" ".join([head[2:], *more]))]
    else:
      result += ["", inline(" ".join([head, *more]))]
  return result[1:]


def _items(block: list[str]) -> Iterator[list[str]]:
  """The parts of a block: definitions, entries of lists, plain lines; each with what continues it."""
  item: list[str] = []
  for line in block:
    is_mid_sentence = item and not TERM.fullmatch(item[0]) and not item[-1].endswith((".", ":", ";"))
    if item and (line.startswith("- ") or (TERM.fullmatch(line) and not is_mid_sentence)):
      yield item
      item = []
    item.append(line)
  yield item
