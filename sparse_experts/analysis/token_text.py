"""Tokens as text for people: what one id looks like, which class it is of, and what stands around it."""

import re
import unicodedata

import numpy as np

from sparse_experts.data import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_BRACKETS, _QUOTES = "()[]{}", "'\"`"
_AROUND = 40  # tokens on each side of which a context is made
_CLASSES = {"Nd": "digit", "Nl": "digit", "No": "digit", "Lu": "uppercase letter", "Lt": "uppercase letter",
            "Ll": "lowercase letter", "Ps": "bracket", "Pe": "bracket", "Pi": "quote", "Pf": "quote",
            "Pc": "underscore"}
_KINDS = {"L": "other letter", "M": "other letter", "P": "punctuation", "S": "symbol", "Z": "space",
          "C": "control character"}


def visible(text: str, spaces: bool = True) -> str:
  """The text with control characters as signs or `<0x1B>`; with `spaces` a space is `␣`."""
  signs = _SIGNS | ({" ": "␣"} if spaces else {})
  unseen = lambda c: unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")
  return "".join(signs.get(c) or (f"<0x{ord(c):02X}>" if unseen(c) else c) for c in text)


def token_class(tokenizer: Tokenizer, i: int) -> str:
  """"mark" for an id that stands for no text, else `text_class` of its text."""
  return "mark" if tokenizer.is_mark(i) else text_class(tokenizer.piece(i))


def text_class(text: str) -> str:
  """The class of a token's text, by the Unicode categories of its characters.

  One character: lowercase letter, digit, bracket, quote, punctuation, symbol, newline, ... Several letters:
  "word" if a space stands in front, "capitalised word", else "part of a word"; other characters of one class
  have that class, else the token is "mixed".
  """
  if _BYTE.fullmatch(text):
    return "part of a character"
  if not text.strip():
    return "newline" if "\n" in text else "tab" if "\t" in text else "space"
  word = text.strip(" ")
  if len(word) > 1 and word.isalpha():
    return "capitalised word" if word[0].isupper() else "word" if text[0] == " " else "part of a word"
  classes = set(map(_character_class, word))
  return classes.pop() if len(classes) == 1 else "mixed"


def _character_class(c: str) -> str:
  if c in _BRACKETS:
    return "bracket"
  if c in _QUOTES:
    return "quote"
  if c in "\n\t":
    return "newline" if c == "\n" else "tab"
  category = unicodedata.category(c)
  return _CLASSES.get(category) or _KINDS[category[0]]


def context(tokenizer: Tokenizer, id_L: np.ndarray, segment_L: np.ndarray, position: int,
            characters: int = 32) -> dict[str, str]:
  """{"before", "token", "after"}: the token at that position and the text around it, of its own sequence."""
  same = segment_L == segment_L[position]
  before, after = (_text(tokenizer, id_L[part][same[part]]) for part in (
      slice(max(position - _AROUND, 0), position), slice(position + 1, position + 1 + _AROUND)))
  before, after = before and before + tokenizer.between, after and tokenizer.between + after
  return {"before": visible(before, spaces=False)[-characters:],
          "token": visible(tokenizer.piece(int(id_L[position]))),
          "after": visible(after, spaces=False)[:characters]}


def _text(tokenizer: Tokenizer, id_L: np.ndarray) -> str:
  """Of all ids, also behind an end of text; bytes of a character that is cut off at an end are left out."""
  ends = np.flatnonzero(id_L == tokenizer.eos_id)
  texts = (tokenizer.decode(part[part != tokenizer.eos_id]) for part in np.split(id_L, ends))
  return "<eos>".join(texts).strip("\N{REPLACEMENT CHARACTER}")
