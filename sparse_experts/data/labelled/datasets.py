"""Records of labelled texts: a prompt with the text, and the label's words, which alone are targets."""

import logging
from collections.abc import Sequence

import numpy as np

from sparse_experts.data.dataset import Dataset, Record, make_records
from sparse_experts.data.sources import Source
from sparse_experts.data.text.packing import pad
from sparse_experts.data.text.tokenizer import NO_ID, Tokenizer
from sparse_experts.errors import UserError

TARGET_LENGTH = 32  # tokens of an encoder-decoder's targets, where data.target_length is unset
PLACE = "{text}"  # in a prompt


def check_prompt(prompt: str) -> None:
  """Raises UserError for a prompt without one place for the text."""
  if prompt.count(PLACE) != 1:
    raise UserError(f"data.prompt='{prompt}' has {prompt.count(PLACE)} places for the text; write {PLACE} "
                    f"once, as in '{PLACE} label:'")


class AnswerRows:
  """A decoder reads prompt and answer in one row; an encoder-decoder the prompt, and its decoder the answer.

  An answer is a space and the label's words, with EOS behind them if the tokenizer has one. encoder, targets:
  lengths of a record's rows, 0 for what it has not.
  """

  def __init__(self, config, tokenizer: Tokenizer, *, ends: bool = True, sentinel: bool = False,
               length: int | None = None):
    """ends: False leaves EOS out, for a model that was not trained to end an answer. length: of a row.

    sentinel: the model fills masked spans, so a sentinel stands for the answer behind the prompt, and before
    it in the decoder, where it is no target.
    """
    self._tokenizer, self._prompt = tokenizer, config.data.prompt
    self._end = [tokenizer.eos_id] * (ends and tokenizer.eos_id != NO_ID)
    self._is_pair = config.model.name == "seq2seq"
    self._length = length or config.data.length
    self.encoder = self._length if self._is_pair else 0
    self.targets = (config.data.target_length or TARGET_LENGTH) if self._is_pair else self._length
    mark = [tokenizer.sentinel(0)] if sentinel else []
    self._behind = [*mark, *([tokenizer.eos_id] if self._is_pair else [])]  # the prompt, in its row
    begin = tokenizer.pad_id if self._is_pair else tokenizer.bos_id
    self._before = [*([] if begin is None else [begin]), *mark]  # in the decoder's row

  def answers(self, words: Sequence[str]) -> list[np.ndarray]:
    """Ids of each label's answer, as they follow the prompt's end."""
    end = self._prompt.partition(PLACE)[2].encode()
    before, encode = self._tokenizer.encode(end), self._tokenizer.encode
    found = []
    for its in words:
      joined = encode(end + b" " + its.encode())
      # A tokenizer may put its own mark before a text: the answer is none, it goes on.
      follows = len(joined) > len(before) and (joined[:len(before)] == before).all()
      ids = joined[len(before):] if follows else encode(b" " + its.encode())
      found.append(np.append(ids, self._end).astype(np.int32))
    longest = max(map(len, found))
    if longest > self.targets - len(self._before) + 1 - (not self._is_pair):
      its = words[max(range(len(found)), key=lambda i: len(found[i]))]
      key = "data.target_length" if self._is_pair else "data.length"
      raise UserError(f"label '{its}' has {longest} tokens, which {key}={self.targets} does not hold; raise "
                      f"{key}, or give it other words by data.label_words")
    return found

  def prompts(self, texts: Sequence[bytes], longest_answer: int, before: bytes = b"") -> list[np.ndarray]:
    """Ids of the prompt of each text, behind `before`; of a text that is too long the end is cut off."""
    head, _, tail = (part.encode() for part in self._prompt.partition(PLACE))
    last, room = self._tokenizer.encode(tail), self._room(longest_answer)
    fixed = len(self._tokenizer.encode(before + head)) + len(last)
    if fixed >= room:
      raise UserError(f"data.length={self._length} holds the prompt's {fixed} tokens and an answer of "
                      f"{longest_answer}, but no text; raise it, or give fewer examples")
    ids_N, end_D = self._tokenizer.encode_documents([before + head + text + tail for text in texts])
    whole = [ids.astype(np.int32) for ids in np.split(ids_N, end_D[:-1])]
    if cut := sum(len(ids) > room for ids in whole):
      logging.warning("%d of %d texts are longer than data.length=%d holds; their ends are cut off", cut,
                      len(texts), self._length)
    return [ids if len(ids) <= room else np.concatenate([ids[:room - len(last)], last]) for ids in whole]

  def _room(self, longest_answer: int) -> int:
    """Most tokens of a prompt."""
    if self._is_pair:
      return self.encoder - len(self._behind)
    return self.targets - len(self._before) - len(self._behind) - longest_answer + 1

  def record(self, prompt: np.ndarray, answer: np.ndarray, label: int) -> Record:
    """One sequence, with weights of 1 on the answer's tokens; no router is told the label by a domain."""
    context = np.array(self._before, np.int32) if self._is_pair else np.concatenate(
        [self._before, prompt, self._behind]).astype(np.int32)
    row = np.concatenate([context, answer])
    inputs, targets = row[:-1], row[1:]
    one, real = np.ones_like(inputs), np.arange(len(inputs)) >= len(context) - 1
    record = dict(
        decoder_inputs=pad(inputs, self.targets), targets=pad(targets, self.targets),
        weights=pad(real, self.targets, np.float32), segments=pad(one, self.targets),
        positions=pad(np.arange(len(inputs)), self.targets),
        target_bytes=pad(self._tokenizer.byte_lengths[targets] * real, self.targets),
        domain=np.int32(0), label=np.int32(label))
    if self._is_pair:
      ids = np.concatenate([prompt, self._behind]).astype(np.int32)
      fields: dict[str, np.ndarray] = dict(
          inputs=ids, segments=np.ones_like(ids), positions=np.arange(len(ids)))
      record |= {f"encoder_{name}": pad(ids, self.encoder) for name, ids in fields.items()}
    return record

  def candidates(self, answers: Sequence[np.ndarray], words: Sequence[str]) -> Record:
    """What a record needs for labels to be ranked: `answers` [C, A], -1 behind each; `answer_bytes` [C]."""
    answer_CA = np.full((len(answers), max(map(len, answers))), -1, np.int32)
    for row_A, ids in zip(answer_CA, answers, strict=True):
      row_A[:len(ids)] = ids
    return dict(answers=answer_CA, answer_bytes=np.array([len(its.encode()) for its in words], np.int32))


def make_dataset(config, split: str, tokenizer: Tokenizer, source: Source, rows: AnswerRows, *,
                 ranked: bool, before: bytes = b"") -> Dataset:
  """The records of `source.train` or `source.valid`.

  ranked: with the answers of all labels. before: what stands before each prompt, as examples.
  """
  texts = source.part(split)
  answers = rows.answers(source.domains)
  prompts = rows.prompts([item["text"] for item in texts], max(map(len, answers)), before)
  more = rows.candidates(answers, source.domains) if ranked else {}
  label = [item["label"] for item in texts]
  return make_records(config, split, len(texts), lambda i, w: (
      rows.record(prompts[w], answers[label[w]], label[w]) | more))


def example(rows: AnswerRows) -> Record:
  """A made-up record, no text being read."""
  return rows.record(np.ones(1, np.int32), np.ones(1, np.int32), 0)
