"""Tokenizers: bytes, or a sentencepiece model given as a file or trained on the source; or only a size.

Ids 0, 1 and 2 are padding (also BOS, as in T5), end of text and unknown, in every vocabulary. The
sentinels follow the pieces: as in T5, sentinel 0 has the highest id and sentinel i the i-th below. They
are never produced from plain text, so a document that spells `<extra_id_0>` stays text. The vocabulary
is padded to a multiple of 128 with ids that never occur (T5: 32,000 pieces, 32,100 ids, 32,128 rows).
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from sparse_experts.errors import UserError, nearest

NUM_SENTINELS = 100
_SENTINEL = re.compile(r"(<extra_id_\d+>)")
_TRAIN_BYTES = 4_000_000  # of text a sentencepiece model is trained on, spread over the source
_SERIALIZED_WORDS = b"words "


class Tokenizer:
  """Text to ids and back; what all tokenizers share.

  Subclasses give `num_pieces`, `encode_documents` and `_decode`; and `serialize`, if their name does not do.
  """

  name: str
  pad_id, eos_id, unk_id = 0, 1, 2
  num_sentinels = NUM_SENTINELS
  begins_rows = True  # rows of a causal model begin with BOS; False: a prompt holds what it is to begin with
  between = ""  # what `decode` writes between two ids
  byte_lengths: np.ndarray  # int32 per id: UTF-8 bytes it stands for; 0 for padding, EOS and sentinels

  def __init__(self, num_pieces: int, byte_lengths: np.ndarray):
    self.num_pieces = num_pieces
    self.vocab_size = -(-(num_pieces + NUM_SENTINELS) // 128) * 128
    self.byte_lengths = np.zeros(self.vocab_size, np.int32)
    self.byte_lengths[:num_pieces] = byte_lengths

  def sentinel(self, i: int) -> int:
    if not 0 <= i < NUM_SENTINELS:
      raise IndexError(f"sentinel {i} is not in 0..{NUM_SENTINELS - 1}")
    return self.num_pieces + NUM_SENTINELS - 1 - i

  def encode(self, text: bytes | str) -> np.ndarray:
    """int32 ids of a text, without EOS."""
    return self.encode_documents([_bytes(text)])[0].astype(np.int32)

  def encode_prompt(self, text: str) -> np.ndarray:
    """As `encode`, but `<extra_id_7>` becomes sentinel 7: how a person writes a masked span."""
    ids = []
    for part in _SENTINEL.split(text):
      i = int(part[10:-1]) if _SENTINEL.fullmatch(part) else NUM_SENTINELS
      ids.append(np.array([self.sentinel(i)], np.int32) if i < NUM_SENTINELS else self.encode(part))
    return np.concatenate(ids)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids up to the first EOS. Padding is left out; sentinels read `<extra_id_i>`."""
    texts: list[str] = []
    run: list[int] = []
    for i in np.asarray(ids, np.int64).ravel().tolist():
      if i == self.eos_id:
        break
      if self.num_pieces <= i < self.num_pieces + NUM_SENTINELS:
        texts += [self._decode(run), f"<extra_id_{self.sentinel(0) - i}>"]
        run = []
      elif i != self.pad_id and i < self.num_pieces:
        run.append(i)
    return "".join([*texts, self._decode(run)])

  def is_mark(self, i: int) -> bool:
    """Whether an id stands for no text: BOS and padding, EOS, unknown, sentinels."""
    return i in (self.pad_id, self.eos_id, self.unk_id) or i >= self.num_pieces

  def piece(self, i: int) -> str:
    """What one id stands for, to be shown: text, `<0xE2>` for a byte of a longer character, or its name."""
    names = {self.pad_id: "<bos>", self.eos_id: "<eos>", self.unk_id: "<unk>"}
    if not self.is_mark(i):
      return self._piece(i)
    number = self.sentinel(0) - i
    return names.get(i, f"<extra_id_{number}>" if number >= 0 else "<unused>")

  def encode_documents(self, texts: Sequence[bytes], *, append_eos: bool = False):
    """All documents in one flat array, and the end of each in it: (ids_N, end_D)."""
    raise NotImplementedError

  def _decode(self, ids: list[int]) -> str:
    raise NotImplementedError

  def _piece(self, i: int) -> str:
    return self._decode([i])

  def serialize(self) -> bytes:
    """What `make_tokenizer` turns into this tokenizer again: a run saves it next to its checkpoints."""
    return self.name.encode()

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(self.serialize()).hexdigest()[:16]


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
    return _shown_byte(i - self.offset)


class SentencePieceTokenizer(Tokenizer):
  """A sentencepiece model, with the sentinels above its pieces as in T5.

  `▁` counts as the one byte of a space and a byte-fallback piece as one byte, so with a model trained
  here (no normalisation, lossless) the lengths of a document's ids add up to its UTF-8 bytes; the one
  exception is a text's own U+2581, which the library cannot tell from a space. A given model that
  normalises (NFKC, merged spaces, a leading `▁`) predicts the normalised text, and its bytes are
  counted; an unknown piece counts as one byte.
  """

  name = "sentencepiece"

  def __init__(self, model: bytes, what: str = "the sentencepiece model"):
    import sentencepiece

    self._model = model
    try:
      self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as e:
      raise UserError(f"{what} is not a sentencepiece model; give a .model file or sentencepiece:SIZE") from e
    if (p.pad_id(), p.eos_id()) != (self.pad_id, self.eos_id):
      raise UserError(f"{what} has pad_id={p.pad_id()} and eos_id={p.eos_id()}; "
                      "train it with pad_id=0, eos_id=1, unk_id=2 as T5's")
    super().__init__(p.get_piece_size(), np.array([_piece_bytes(p, i) for i in range(p.get_piece_size())]))

  def encode_documents(self, texts, *, append_eos=False):
    lists = self._processor.encode([t.decode("utf-8", errors="replace") for t in texts], add_eos=append_eos)
    return _joined(lists, np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

  def _decode(self, ids):
    return self._processor.decode(ids)

  def _piece(self, i):
    piece = self._processor.id_to_piece(i)
    return _shown_byte(int(piece[1:-1], 16)) if self._processor.is_byte(i) else piece.replace("▁", " ")

  def serialize(self):
    return self._model


class VocabularySize(Tokenizer):
  """The size of a vocabulary that is not at hand: enough to count parameters, to compile, and to sample ids.

  `size` counts all ids, sentinels and padding to a multiple of 128 included (T5: 32,128). Text is ids with
  spaces between them. EOS is 1 as elsewhere, whatever the model means by it.
  """

  begins_rows = False

  def __init__(self, size: int):
    super().__init__(max(size - NUM_SENTINELS, 0), np.zeros(max(size - NUM_SENTINELS, 0), np.int32))
    self.name, self.vocab_size = f"vocabulary:{size}", size
    self.byte_lengths = np.zeros(max(size, NUM_SENTINELS), np.int32)

  def encode_documents(self, texts, *, append_eos=False):
    end = [str(self.eos_id).encode()] * append_eos
    lists = [[*text.split(), *end] for text in texts]
    for word in (word for words in lists for word in words):
      if not word.isdigit() or int(word) >= self.vocab_size:
        shown = word.decode("utf-8", errors="replace")
        raise UserError(f"tokenizer '{self.name}' is a size without words, and '{shown}' is none of its ids; "
                        f"write ids below {self.vocab_size} with spaces between, or give the path of a "
                        "sentencepiece .model file")
    return _joined([list(map(int, words)) for words in lists])

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
    return _joined(lists)

  def _decode(self, ids):
    return " ".join(self._words[i - self.unk_id - 1] if i > self.unk_id else "?" for i in ids)

  def serialize(self):
    return _SERIALIZED_WORDS + json.dumps(self._words).encode()


def make_tokenizer(name: str | bytes, texts: Iterable[bytes | str] | None = None) -> Tokenizer:
  """The tokenizer called `name`: `bytes`, a path of a model, or `sentencepiece:SIZE`, trained on `texts`.

  `vocabulary:SIZE` knows its size and no words, `words` those of `texts`. `name` may also be what
  `Tokenizer.serialize` returned; then nothing is trained.
  """
  if isinstance(name, bytes):
    if name == b"bytes" or name.startswith(b"vocabulary:"):
      return make_tokenizer(name.decode())
    if name.startswith(_SERIALIZED_WORDS):
      return WordTokenizer(json.loads(name.removeprefix(_SERIALIZED_WORDS)))
    return SentencePieceTokenizer(name, "the saved tokenizer")
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
    return SentencePieceTokenizer(train_sentencepiece(texts, int(size)))
  if os.path.isfile(name):
    with open(name, "rb") as f:
      return SentencePieceTokenizer(f.read(), f"tokenizer '{name}'")
  if os.sep in name or name.endswith(".model"):
    raise UserError(f"tokenizer '{name}' does not exist; give the path of a sentencepiece .model file")
  raise UserError(f"tokenizer '{name}' is unknown"
                  + nearest(name, ["bytes", "sentencepiece:SIZE", "vocabulary:SIZE", "words", "PATH.model"]))


def train_sentencepiece(texts: Iterable[bytes | str], size: int) -> bytes:
  """A unigram model of at most `size` pieces, lossless on any text; the same texts give the same bytes.

  Large sources are sampled: every n-th line, about 4 MB.
  """
  import sentencepiece

  decoded = (_bytes(text).decode("utf-8", errors="replace") for text in texts)
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


def _joined(lists: Sequence[Sequence[int]], dtype=np.int32) -> tuple[np.ndarray, np.ndarray]:
  """(all ids, the end of each list in them)."""
  end_D = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
  return np.fromiter((i for ids in lists for i in ids), dtype, count=int(end_D[-1]) if lists else 0), end_D


def _piece_bytes(processor, i: int) -> int:
  if processor.is_control(i):
    return 0
  if processor.is_unknown(i) or processor.is_byte(i):
    return 1
  return len(processor.id_to_piece(i).replace("▁", " ").encode())


def _shown_byte(byte: int) -> str:
  """The character of an ASCII byte, else `<0xE2>`."""
  return chr(byte) if byte < 0x80 else f"<0x{byte:02X}>"


def _split(text: bytes | str) -> list[str]:
  return _bytes(text).decode("utf-8", errors="replace").split()


def _bytes(text: bytes | str) -> bytes:
  return text.encode() if isinstance(text, str) else bytes(text)
