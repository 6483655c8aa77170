"""Tokenizers of converted models keep their owner's numbers: LLaMA's sentencepiece, and tokenizer.json."""

import io
import json

import numpy as np
import pytest
import sentencepiece

from sparse_experts.data import make_tokenizer
from sparse_experts.data.text import packing
from sparse_experts.errors import UserError
from tests.data.test_tokenizers import CORPUS

TEXT = "def é(self):\n    return  '日本 <s> </s>'\n"


def llama_model(size=400):
  """Numbered as LLaMA's: unknown 0, BOS 1, EOS 2, no padding; with bytes, a leading space added."""
  model = io.BytesIO()
  lines = b"".join(CORPUS).decode().split("\n")
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=size,
      hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
      remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
  return model.getvalue()


def byte_level(template=True):
  """tokenizer.json of a byte-level BPE, as GPT-2's, with special tokens; its template begins with BOS."""
  tokenizers = pytest.importorskip("tokenizers")
  t = tokenizers.Tokenizer(tokenizers.models.BPE())
  t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  t.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  t.train_from_iterator([text.decode() for text in CORPUS], trainer)
  if template:
    t.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", t.token_to_id("<s>"))])
  return t.to_str()


@pytest.fixture(scope="module", params=["llama", "tokenizer.json"])
def tokenizer(request, tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / request.param
  path.write_bytes(llama_model() if request.param == "llama" else byte_level().encode())
  return make_tokenizer(str(path))


def test_ids_are_the_owners(tokenizer):
  """No sentinels, rows as many as pieces, and marks that plain text never makes."""
  ids = tokenizer.encode(TEXT)
  assert tokenizer.decode(ids) == TEXT and ids.max() < tokenizer.vocab_size == tokenizer.num_pieces
  assert tokenizer.num_sentinels == 0 and tokenizer.pad_id == -1
  assert (tokenizer.bos_id, tokenizer.eos_id) == ((1, 2) if tokenizer.name == "sentencepiece" else (0, 1))
  assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
  assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, 7]) == TEXT
  assert tokenizer.piece(tokenizer.bos_id) == "<bos>" and tokenizer.is_mark(tokenizer.eos_id)
  assert tokenizer.piece(tokenizer.vocab_size - 1) and tokenizer.piece(tokenizer.vocab_size) == "<unused>"
  with pytest.raises(IndexError):
    tokenizer.sentinel(0)


def test_lengths_add_up_to_the_bytes(tokenizer):
  """A sentencepiece model that adds a leading space counts it."""
  added = tokenizer.name == "sentencepiece"
  assert tokenizer.byte_lengths[tokenizer.encode(TEXT)].sum() == len(TEXT.encode()) + added
  assert not tokenizer.byte_lengths[[tokenizer.bos_id, tokenizer.eos_id]].any()


def test_documents_end_and_come_back(tokenizer):
  ids, end = tokenizer.encode_documents([b"one", b"two"], append_eos=True)
  assert [part[-1] for part in np.split(ids, end[:-1])] == [tokenizer.eos_id] * 2
  again = make_tokenizer(tokenizer.serialize())
  assert again.fingerprint == tokenizer.fingerprint
  assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
  assert (again.bos_id, again.eos_id, again.vocab_size) == (
      tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)


def test_a_model_may_have_more_rows_than_there_are_pieces(tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(llama_model())
  pieces = make_tokenizer(str(path)).num_pieces
  wider = make_tokenizer(str(path), facts={"vocab_size": pieces + 7, "eos_id": 5})
  assert (wider.vocab_size, wider.eos_id, len(wider.byte_lengths)) == (pieces + 7, 5, pieces + 7)
  with pytest.raises(UserError, match=f"makes {pieces} ids, the model has {pieces - 1}"):
    make_tokenizer(str(path), facts={"vocab_size": pieces - 1})


def test_without_a_template_nothing_stands_before_a_text(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(byte_level(template=False))
  assert make_tokenizer(str(path)).bos_id is None
  fields = json.loads(path.read_text()) | {"model": {"type": "nothing"}}
  path.write_text(json.dumps(fields))
  with pytest.raises(UserError, match="is no tokenizer.json .*; fetch it again"):
    make_tokenizer(str(path))


def test_a_first_token_without_bos_is_no_target():
  """Its place is padding, with weight 0; every other target has its true predecessor, of its own document."""
  tokenizer = make_tokenizer("vocabulary:50")
  stream = packing.concatenate([dict(text=b"5 6 7", domain=0), dict(text=b"8 9", domain=0)], tokenizer,
                               append_eos=True)
  assert stream.ids_N.tolist() == [5, 6, 7, 8, 9]
  first, second = (packing.causal_record(stream, window, 4, tokenizer.byte_lengths, tokenizer.bos_id)
                   for window in packing.cut(stream, 4))
  assert first["decoder_inputs"].tolist() == [0, 5, 6, 0] and first["targets"].tolist() == [5, 6, 7, 8]
  assert first["weights"].tolist() == [0, 1, 1, 0] == (first["segments"] > 0).tolist()
  assert first["target_bytes"].tolist() == [0, 1, 1, 0]
  assert second["decoder_inputs"].tolist() == [8, 0, 0, 0] and second["weights"].tolist() == [1, 0, 0, 0]
