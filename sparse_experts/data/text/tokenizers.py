"""Tokenizers: bytes, or a sentencepiece model given as a file or trained on the source; or only a size.

Ids 0, 1 and 2 are padding (also BOS, as in T5), end of text and unknown, in every vocabulary. The
sentinels follow the pieces: as in T5, sentinel 0 has the highest id and sentinel i the i-th below. They
are never produced from plain text, so a document that spells `<extra_id_0>` stays text. The vocabulary
is padded to a multiple of 128 with ids that never occur (T5: 32,000 pieces, 32,100 ids, 32,128 rows).
"""

import contextlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sparse_experts import storage
from sparse_experts.data.text import foreign
from sparse_experts.data.text.tokenizer import (
  NUM_SENTINELS,
  Tokenizer,
  as_bytes,
  joined,
  piece_bytes,
  shown_byte,
)
from sparse_experts.errors import UserError, nearest

_TRAIN_BYTES = 4_000_000  # of text a sentencepiece model is trained on, spread over the source
_SERIALIZED_WORDS = b"words "


class ByteTokenizer(Tokenizer):
  """Id 3 + b is the byte b. Bytes that are not UTF-8 survive encoding and are replaced in `decode`."""

  name = "bytes"
  offset = 3

  def __init__(self):
    super().__init__(self.offset + 256, np.array([0, 0, 0] + [1] * 256))

  def encode_documents(self, texts, *, append_eos=False):
    # One pass over all bytes; a separator after each document keeps EOS's place.
    separator = b"\0" if append_eos else b""
    flat = np.frombuffer(b"".join(text + separator for text in texts), np.uint8)
    end_D = np.cumsum([len(text) + append_eos for text in texts], dtype=np.int64)
    ids = flat.astype(np.uint16)
    ids += self.offset
    if append_eos:
      ids[end_D - 1] = self.eos_id
    return ids, end_D

  def _decode(self, ids):
    return bytes(i - self.offset for i in ids if i >= self.offset).decode("utf-8", errors="replace")

  def _piece(self, i):
    return shown_byte(i - self.offset)


class SentencePieceTokenizer(Tokenizer):
  """A sentencepiece model, with the sentinels above its pieces as in T5.

  `▁` counts as the one byte of a space and a byte-fallback piece as one byte, so with a model trained
  here (no normalisation, lossless) the lengths of a document's ids add up to its UTF-8 bytes; the one
  exception is a text's own U+2581, which the library cannot tell from a space. A given model that
  normalises (NFKC, merged spaces, a leading `▁`) predicts the normalised text, and its bytes are
  counted; an unknown piece counts as one byte.
  """

  name, file = "sentencepiece", "spiece.model"

  def __init__(self, model: bytes, processor: Any):
    self.model, self._processor = model, processor
    p = processor
    super().__init__(p.get_piece_size(), np.array([piece_bytes(p, i) for i in range(p.get_piece_size())]))

  def encode_documents(self, texts, *, append_eos=False):
    lists = self._processor.encode([t.decode("utf-8", errors="replace") for t in texts], add_eos=append_eos)
    return joined(lists, np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

  def _decode(self, ids):
    return self._processor.decode(ids)

  def _piece(self, i):
    piece = self._processor.id_to_piece(i)
    return shown_byte(int(piece[1:-1], 16)) if self._processor.is_byte(i) else piece.replace("▁", " ")

  def serialize(self):
    return self.model


class VocabularySize(Tokenizer):
  """The size of a vocabulary that is not at hand: text is ids with spaces between them.

  `size` counts all ids, sentinels and padding to a multiple of 128 included (T5: 32,128). Texts hold what
  marks the model knows: no BOS and no EOS is added, and the first id is no target. An id counts as one byte.
  Sampling ends at id 1, as elsewhere, whatever the model means by it.
  """

  bos_id = None

  def __init__(self, size: int):
    pieces = max(size - NUM_SENTINELS, 0)
    super().__init__(pieces, np.zeros(pieces, np.int32), size)
    self.name, self.byte_lengths = f"vocabulary:{size}", np.ones(max(size, NUM_SENTINELS), np.int32)

  def encode_documents(self, texts, *, append_eos=False):
    lists = [text.split() for text in texts]
    for word in (word for words in lists for word in words):
      if not word.isdigit() or int(word) >= self.vocab_size:
        shown = word.decode("utf-8", errors="replace")
        raise UserError(f"tokenizer '{self.name}' is a size without words, and '{shown}' is none of its ids; "
                        f"write ids below {self.vocab_size} with spaces between, or give the path of a "
                        "sentencepiece .model file")
    return joined([list(map(int, words)) for words in lists])

  def decode(self, ids):
    """The ids up to the first EOS, each behind a space."""
    ids = np.asarray(ids).ravel().tolist()
    return "".join(f" {i}" for i in (ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids))


class WordTokenizer(Tokenizer):
  """Id 3 + i is word i, what stands between spaces; other words are `unk_id`.

  For texts that are only read, never written: their spaces are lost and no bytes are counted.
  """

  name, between = "words", " "

  def __init__(self, words: Sequence[str]):
    self._words, first = tuple(words), self.unk_id + 1
    super().__init__(first + len(words), np.zeros(first + len(words), np.int32))
    self._id = {word: first + i for i, word in enumerate(words)}

  def encode_documents(self, texts, *, append_eos=False):
    lists = [[self._id.get(word, self.unk_id) for word in _split(text)] + [self.eos_id] * append_eos
             for text in texts]
    return joined(lists)

  def _decode(self, ids):
    return " ".join(self._words[i - self.unk_id - 1] if i > self.unk_id else "?" for i in ids)

  def serialize(self):
    return _SERIALIZED_WORDS + json.dumps(self._words).encode()


def make_tokenizer(name: str | bytes, texts: Iterable[bytes | str] | None = None,
                   facts: dict[str, Any] | None = None) -> Tokenizer:
  """The tokenizer called `name`: `bytes`, a path of a model, or `sentencepiece:SIZE`, trained on `texts`.

  `vocabulary:SIZE` knows its size and no words, `words` those of `texts`. `name` may also be what
  `Tokenizer.serialize` returned, or the path of a file with that; then nothing is trained. A path may be of a
  sentencepiece model or a tokenizer.json; facts: as of a `ForeignTokenizer`, where the file is such.
  """
  if isinstance(name, bytes):
    return _from_bytes(name, "the saved tokenizer")
  if name == "bytes":
    return ByteTokenizer()
  if name == "words":
    if texts is None:
      raise UserError("tokenizer 'words' is made of the source's text; give it some, or choose bytes")
    return WordTokenizer(sorted({word for text in texts for word in _split(text)}))
  kind, _, size = name.partition(":")
  if kind == "vocabulary":
    if not size.isdecimal() or int(size) < 3:
      raise UserError(f"tokenizer '{name}' needs a size of at least 3 ids, as in vocabulary:32128")
    return VocabularySize(int(size))
  if kind == "sentencepiece":
    if not size.isdecimal() or int(size) < 300:
      raise UserError(f"tokenizer '{name}' needs a size of at least 300 pieces (256 of them are bytes), "
                      "as in sentencepiece:8000")
    if texts is None:
      raise UserError(f"tokenizer '{name}' is trained on the source's text; give the path of a .model")
    return _from_bytes(train_sentencepiece(texts, int(size)), f"tokenizer '{name}'")
  with contextlib.suppress(OSError):
    if storage.facts(name).is_file:
      return _from_bytes(storage.read(name), f"tokenizer '{name}'", facts)
  if os.sep in name or name.endswith(".model"):
    raise UserError(f"tokenizer '{name}' does not exist; give the path of a sentencepiece .model file")
  raise UserError(f"tokenizer '{name}' is unknown"
                  + nearest(name, ["bytes", "sentencepiece:SIZE", "vocabulary:SIZE", "words", "PATH.model"]))


def _from_bytes(data: bytes, what: str, facts: dict[str, Any] | None = None) -> Tokenizer:
  """The tokenizer of a file, or of what `serialize` made; `what` is what messages call it."""
  if data == b"bytes" or data.startswith(b"vocabulary:"):
    return make_tokenizer(data.decode())
  if data.startswith(_SERIALIZED_WORDS):
    return WordTokenizer(json.loads(data.removeprefix(_SERIALIZED_WORDS)))
  if data.startswith(foreign.HEADER):
    line, _, data = data.removeprefix(foreign.HEADER).partition(b"\n")
    facts = json.loads(line)
  if data.lstrip().startswith(b"{"):
    return foreign.HuggingFaceTokenizer(data, facts or {}, what)
  import sentencepiece

  try:
    if not data:  # of which it makes a model that complains on stderr each time it is asked
      raise ValueError("empty")
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
  except Exception as e:
    raise UserError(f"{what} is not a sentencepiece model; give a .model file, a tokenizer.json or "
                    "sentencepiece:SIZE") from e
  if (processor.pad_id(), processor.eos_id(), facts) == (Tokenizer.pad_id, Tokenizer.eos_id, None):
    return SentencePieceTokenizer(data, processor)
  return foreign.ForeignSentencePiece(data, processor, facts or {})


def train_sentencepiece(texts: Iterable[bytes | str], size: int) -> bytes:
  """A unigram model of at most `size` pieces, lossless on any text; the same texts give the same bytes.

  Large sources are sampled: every n-th line, about 4 MB.
  """
  import sentencepiece

  decoded = (as_bytes(text).decode("utf-8", errors="replace") for text in texts)
  lines = [line for text in decoded for line in text.split("\n") if line]
  if not lines:
    raise UserError(f"tokenizer 'sentencepiece:{size}' has no text to train on; use the bytes tokenizer")
  stride = -(-sum(map(len, lines)) // _TRAIN_BYTES)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines[::stride]), model_writer=model, model_type="unigram", vocab_size=size,
      hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0,
      normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
      allow_whitespace_only_pieces=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
      num_threads=1, minloglevel=2)  # threads would add up in any order
  return model.getvalue()


def _split(text: bytes | str) -> list[str]:
  return as_bytes(text).decode("utf-8", errors="replace").split()
