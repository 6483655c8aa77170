"""What all tokenizers share."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

NUM_SENTINELS = 100
NO_ID = -1
_SENTINEL = re.compile(r"(<extra_id_\d+>)")


class Tokenizer:
  """Text to ids and back; what all tokenizers share.

  file: what the model is called in a folder of others, if it is one: then `model` holds it.
  Subclasses give `num_pieces`, `encode_documents` and `_decode`; and `serialize`, if their name does not do.
  """

  name: str
  pad_id, eos_id, unk_id = 0, 1, 2  # NO_ID: there is none
  bos_id: int | None = 0  # what stands before a text; None: nothing, and its first token is no target
  num_sentinels = NUM_SENTINELS
  file: str = ""
  model: bytes
  between = ""  # what `decode` writes between two ids
  byte_lengths: np.ndarray  # int32 per id: UTF-8 bytes it stands for; 0 for padding, EOS and sentinels

  def __init__(self, num_pieces: int, byte_lengths: np.ndarray, vocab_size: int | None = None):
    self.num_pieces = num_pieces
    self.vocab_size = -(-(num_pieces + NUM_SENTINELS) // 128) * 128 if vocab_size is None else vocab_size
    self.byte_lengths = np.zeros(self.vocab_size, np.int32)
    self.byte_lengths[:num_pieces] = byte_lengths

  def sentinel(self, i: int) -> int:
    if not 0 <= i < self.num_sentinels:
      raise IndexError(f"sentinel {i} is not in 0..{self.num_sentinels - 1}")
    return self.num_pieces + self.num_sentinels - 1 - i

  def encode(self, text: bytes | str) -> np.ndarray:
    """int32 ids of a text, without EOS."""
    return self.encode_documents([as_bytes(text)])[0].astype(np.int32)

  def encode_prompt(self, text: str) -> np.ndarray:
    """As `encode`, but `<extra_id_7>` becomes sentinel 7: how a person writes a masked span."""
    ids = []
    for part in _SENTINEL.split(text):
      i = int(part[10:-1]) if _SENTINEL.fullmatch(part) else self.num_sentinels
      ids.append(np.array([self.sentinel(i)], np.int32) if i < self.num_sentinels else self.encode(part))
    return np.concatenate(ids)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids up to the first EOS. Padding is left out; sentinels read `<extra_id_i>`."""
    texts: list[str] = []
    run: list[int] = []
    for i in np.asarray(ids, np.int64).ravel().tolist():
      if i == self.eos_id:
        break
      if self.num_pieces <= i < self.num_pieces + self.num_sentinels:
        texts += [self._decode(run), f"<extra_id_{self.sentinel(0) - i}>"]
        run = []
      elif i not in (self.pad_id, self.bos_id) and i < self.num_pieces:
        run.append(i)
    return "".join([*texts, self._decode(run)])

  def is_mark(self, i: int) -> bool:
    """Whether an id stands for no text: BOS and padding, EOS, unknown, sentinels."""
    return i in (self.pad_id, self.bos_id, self.eos_id, self.unk_id) or i >= self.num_pieces

  def piece(self, i: int) -> str:
    """What one id stands for, to be shown: text, `<0xE2>` for a byte of a longer character, or its name."""
    names = {self.bos_id: "<bos>", self.eos_id: "<eos>", self.unk_id: "<unk>"}
    if not self.is_mark(i):
      return self._piece(i)
    number = self.num_pieces + self.num_sentinels - 1 - i
    return names.get(i, f"<extra_id_{number}>" if 0 <= number < self.num_sentinels else "<unused>")

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


def joined(lists: Sequence[Sequence[int]], dtype=np.int32) -> tuple[np.ndarray, np.ndarray]:
  """(all ids, the end of each list in them)."""
  end_D = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
  return np.fromiter((i for ids in lists for i in ids), dtype, count=int(end_D[-1]) if lists else 0), end_D


def piece_bytes(processor, i: int) -> int:
  if processor.is_control(i):
    return 0
  if processor.is_unknown(i) or processor.is_byte(i):
    return 1
  return len(processor.id_to_piece(i).replace("▁", " ").encode())


def shown_byte(byte: int) -> str:
  """The character of an ASCII byte, else `<0xE2>`."""
  return chr(byte) if byte < 0x80 else f"<0x{byte:02X}>"


def as_bytes(text: bytes | str) -> bytes:
  return text.encode() if isinstance(text, str) else bytes(text)
