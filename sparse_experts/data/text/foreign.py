"""Tokenizers of converted models: ids mean what the model's owner says, and there are no sentinels.

Sentencepiece models that are not numbered as T5's (LLaMA's), and `tokenizer.json` of Hugging Face's library
`tokenizers`.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_experts.data.text.tokenizer import NO_ID, Tokenizer, joined, piece_bytes, shown_byte
from sparse_experts.errors import UserError

HEADER = b"foreign "  # in front of what `serialize` makes: a line of JSON, then the file
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class ForeignTokenizer(Tokenizer):
  """What both kinds share. Ids are used as they are; a model may have more rows than there are pieces.

  facts: `vocab_size`, rows of the model, by default the number of pieces; `eos_id` and `bos_id`, by default
  the file's own. bos_id None: nothing stands before a text, and its first token is no target.
  """

  num_sentinels = 0
  pad_id = NO_ID

  def __init__(self, model: bytes, facts: dict[str, Any], num_pieces: int, byte_lengths: np.ndarray):
    rows = facts.get("vocab_size", num_pieces)
    if rows < num_pieces:
      raise UserError(f"the tokenizer makes {num_pieces} ids, the model has {rows}; give the model's own")
    super().__init__(num_pieces, byte_lengths, rows)
    self.model, self.facts = model, facts

  def serialize(self) -> bytes:
    facts = {"vocab_size": self.vocab_size, "eos_id": self.eos_id, "bos_id": self.bos_id}
    return HEADER + json.dumps(facts).encode() + b"\n" + self.model

  def _with_ends(self, lists: Sequence[Sequence[int]], append_eos: bool) -> tuple[np.ndarray, np.ndarray]:
    end = [self.eos_id] * (append_eos and self.eos_id != NO_ID)
    return joined([[*ids, *end] for ids in lists])


class ForeignSentencePiece(ForeignTokenizer):
  """A sentencepiece model with its own numbers, as LLaMA's: texts begin with its BOS if it has one."""

  name, file = "sentencepiece", "tokenizer.model"

  def __init__(self, model: bytes, processor: Any, facts: dict[str, Any]):
    self._processor = p = processor
    self.unk_id, self.eos_id = p.unk_id(), facts.get("eos_id", p.eos_id())
    self.bos_id = facts["bos_id"] if "bos_id" in facts else (p.bos_id() if p.bos_id() >= 0 else None)
    sizes = np.array([piece_bytes(p, i) for i in range(p.get_piece_size())])
    super().__init__(model, facts, p.get_piece_size(), sizes)

  def encode_documents(self, texts, *, append_eos=False):
    return self._with_ends(
        self._processor.encode([t.decode("utf-8", errors="replace") for t in texts]), append_eos)

  def _decode(self, ids):
    return self._processor.decode(ids)

  def _piece(self, i):
    piece = self._processor.id_to_piece(i)
    return shown_byte(int(piece[3:-1], 16)) if self._processor.is_byte(i) else piece.replace("▁", " ")


class HuggingFaceTokenizer(ForeignTokenizer):
  """A tokenizer.json. Its own special tokens are never made from plain text.

  Whether texts begin with BOS is its post-processor's choice: what it puts in front of an empty text.
  """

  name, file = "tokenizers", "tokenizer.json"

  def __init__(self, model: bytes, facts: dict[str, Any], what: str):
    try:
      import tokenizers
    except ImportError:
      raise UserError(f"{what} needs the library tokenizers; pip install 'sparse_experts[hf]'") from None
    try:
      self._tokenizer = t = tokenizers.Tokenizer.from_str(model.decode())
    except Exception as e:  # the library raises plain Exception
      raise UserError(f"{what} is no tokenizer.json ({e}); fetch it again") from None
    special = {i: token for i, token in t.get_added_tokens_decoder().items() if token.special}
    begin = t.encode("", add_special_tokens=True).ids
    ends = [i for i, token in special.items() if token.content in _ENDS]
    self.eos_id = facts.get("eos_id", ends[0] if ends else NO_ID)
    self.bos_id = facts["bos_id"] if "bos_id" in facts else (
        begin[0] if begin and begin[0] != self.eos_id else None)
    self.unk_id = NO_ID
    t.encode_special_tokens = True
    self._of_bytes = '"ByteLevel"' in json.dumps(json.loads(model).get("decoder"))
    vocabulary = t.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int32)
    for piece, i in vocabulary.items():
      sizes[i] = 0 if i in special else self._bytes_of(piece, i)
    self._special = special
    super().__init__(model, facts, len(sizes), sizes)

  def _bytes_of(self, piece: str, i: int) -> int:
    if i in self._tokenizer.get_added_tokens_decoder():
      return len(piece.encode())
    if self._of_bytes:
      return len(piece)  # a letter for each byte
    return 1 if _BYTE_PIECE.fullmatch(piece) else len(piece.replace("▁", " ").encode())

  def encode_documents(self, texts, *, append_eos=False):
    found = self._tokenizer.encode_batch(
        [t.decode("utf-8", errors="replace") for t in texts], add_special_tokens=False)
    return self._with_ends([one.ids for one in found], append_eos)

  def is_mark(self, i):
    return super().is_mark(i) or i in self._special

  def _decode(self, ids):
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def _piece(self, i):
    return self._decode([i])
