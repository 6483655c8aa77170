"""Documents from text files: plain, .gz, .zip, or folders of them."""

import logging
from collections.abc import Sequence

from sparse_experts.data.files import members
from sparse_experts.errors import UserError

_LARGEST_DOCUMENT = 64 * 1024
_SMALLEST_DOCUMENT = 1024


def read(path: str) -> tuple[list[dict], list[str]]:
  """(documents, domain names) of a file or a folder; each first sub-folder is a domain, a .zip is a folder.

  Long files are cut into documents, so that a single book can be split: at blank lines, each piece at
  most 64 KiB, and small enough for a source of 64 pieces, or of two if there is little text.
  """
  named = [(outer + inner, utf8(data, name))
           for outer, inner, data, name in members(path, "a text file, .gz, .zip or a folder")]
  total = sum(len(text) for _, text in named)
  if not total:
    raise UserError(f"data.source='files:{path}' holds no text; give a text file, .gz, .zip or a folder")
  size = min(max(total // 64, min(_SMALLEST_DOCUMENT, -(-total // 2))), _LARGEST_DOCUMENT)
  return with_domains([(parts, piece) for parts, text in named for piece in pieces(text, size)])


def with_domains(named: Sequence[tuple[tuple[str, ...], bytes]]) -> tuple[list[dict], list[str]]:
  """Documents of (path parts, text) pairs; the first folder of a path is its domain, '.' if it has none."""
  folder_D = [parts[0] if len(parts) > 1 else "." for parts, _ in named]
  domains = sorted(set(folder_D))
  number = {folder: i for i, folder in enumerate(domains)}
  return [dict(text=text, domain=number[f]) for f, (_, text) in zip(folder_D, named, strict=True)], domains


def pieces(text: bytes, size: int) -> list[bytes]:
  """The text cut into pieces of at most `size` bytes, after a blank line, else a line, else a character."""
  parts, start = [], 0
  while len(text) - start > size:
    stop = start + size
    for mark in (b"\n\n", b"\n"):
      at = text.rfind(mark, start + size // 4, stop)
      if at >= 0:
        stop = at + len(mark)
        break
    else:
      while stop > start + 1 and text[stop] & 0xC0 == 0x80:  # never inside a UTF-8 character
        stop -= 1
    parts.append(text[start:stop])
    start = stop
  return [*parts, text[start:]] if start < len(text) else parts


def utf8(data: bytes, name: str) -> bytes:
  """The data if it is UTF-8; a stray byte (at most 1 in 100) becomes U+FFFD, with a warning."""
  try:
    data.decode()
    at, stray = data.find(b"\0"), 0
  except UnicodeDecodeError as e:
    text = data.decode(errors="replace")
    at, stray = e.start, text.count("\ufffd")
    if b"\0" not in data and stray * 100 <= len(data):
      logging.warning("%s: %d bytes that are not UTF-8 were replaced by U+FFFD", name, stray)
      return text.encode()
  if at >= 0:
    raise UserError(f"data.source='{name}' is not UTF-8 text (byte 0x{data[at]:02x} at {at}); "
                    "convert it or take it out of the folder")
  return data
