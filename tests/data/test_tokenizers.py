"""Tokenizers are lossless, count bytes right, and come back from what they save."""

import numpy as np
import pytest

from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError

TEXT = "def f(x):\n\treturn  'é ✓ 日本 ﬁ ½ ①'\r\n\n  # <extra_id_0> and  two spaces \n"
CORPUS = [f"def name(self, value):\n    return self.value + {i}\n".encode() for i in range(400)]


@pytest.fixture(scope="module", params=["bytes", "sentencepiece:400"])
def tokenizer(request):
  return make_tokenizer(request.param, CORPUS)


def test_round_trip_and_byte_count(tokenizer):
  ids = tokenizer.encode(TEXT)
  assert tokenizer.decode(ids) == TEXT
  assert tokenizer.byte_lengths[ids].sum() == len(TEXT.encode())
  assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size


def test_plain_text_never_becomes_a_sentinel(tokenizer):
  sentinels = {tokenizer.sentinel(i) for i in range(tokenizer.num_sentinels)}
  assert len(sentinels) == 100 and max(sentinels) == tokenizer.sentinel(0) < tokenizer.vocab_size
  assert not sentinels & set(tokenizer.encode(TEXT).tolist())
  prompt = tokenizer.encode_prompt("a<extra_id_0>b<extra_id_99><extra_id_100>")
  assert [i for i in prompt.tolist() if i in sentinels] == [tokenizer.sentinel(0), tokenizer.sentinel(99)]
  assert tokenizer.decode(prompt) == "a<extra_id_0>b<extra_id_99><extra_id_100>"


def test_special_ids_stand_for_no_bytes(tokenizer):
  special = [tokenizer.pad_id, tokenizer.eos_id, tokenizer.sentinel(0), tokenizer.sentinel(99)]
  assert not tokenizer.byte_lengths[special].any()
  assert tokenizer.decode([0, *tokenizer.encode("ab"), 1, *tokenizer.encode("after")]) == "ab"


def test_documents_in_one_pass_equal_one_by_one(tokenizer):
  texts = [b"one", b"", b"two words\n", "日".encode()]
  ids, end = tokenizer.encode_documents(texts, append_eos=True)
  parts = np.split(ids, end[:-1])
  assert [part.tolist() for part in parts] == [[*tokenizer.encode(text).tolist(), 1] for text in texts]


def test_saved_tokenizer_comes_back(tokenizer):
  again = make_tokenizer(tokenizer.serialize())
  assert again.fingerprint == tokenizer.fingerprint and again.vocab_size == tokenizer.vocab_size
  np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_byte_vocabulary():
  t = make_tokenizer("bytes")
  assert (t.vocab_size, t.sentinel(0), t.sentinel(99)) == (384, 358, 259)
  assert t.encode(b"\x00\xff").tolist() == [3, 258]
  assert t.decode([3 + 0xC3]) == "�"


def test_trained_model_is_the_same_every_time_and_loads_from_a_path(tmp_path):
  first, second = (make_tokenizer("sentencepiece:320", CORPUS) for _ in range(2))
  assert first.serialize() == second.serialize()
  path = tmp_path / "text.model"
  path.write_bytes(first.serialize())
  assert make_tokenizer(str(path)).fingerprint == first.fingerprint
  assert len(first.encode(CORPUS[0])) < .8 * len(CORPUS[0])


@pytest.mark.parametrize(("name", "words"), [
    ("byte", "did you mean 'bytes'"),
    ("sentencepiece:", "needs a size"),
    ("sentencepiece:12", "at least 300"),
    ("sentencepiece:400", "trained on the source's text"),
    ("vocabulary:", "needs a size of at least 3 ids, as in vocabulary:32128"),
    ("/nowhere/t5.model", "'/nowhere/t5.model' does not exist"),
    (__file__, "is not a sentencepiece model"),
])
def test_mistakes(name, words):
  with pytest.raises(UserError, match=words) as e:
    make_tokenizer(name)
  assert "\n" not in str(e.value)


def test_a_size_is_enough_to_build_and_not_to_read_text():
  t = make_tokenizer("vocabulary:32128")
  assert (t.vocab_size, t.sentinel(0)) == (32_128, 32_127)
  with pytest.raises(UserError, match=r"'vocabulary:32128' is a size without words.* give the path") as e:
    t.encode(TEXT)
  assert "\n" not in str(e.value)


def test_nothing_to_train_on():
  with pytest.raises(UserError, match="no text to train on"):
    make_tokenizer("sentencepiece:400", [b"", b"\n"])


def test_a_size_without_words_speaks_ids():
  t = make_tokenizer("vocabulary:96")
  assert t.vocab_size == 96 and t.encode("5 6 95").tolist() == [5, 6, 95]
  assert t.decode([5, 6, 95, 1, 7]) == " 5 6 95"
  assert make_tokenizer(t.serialize()).name == t.name
  ids, end = t.encode_documents([b"5 6", b"7"], append_eos=True)
  assert (ids.tolist(), end.tolist()) == ([5, 6, 7], [2, 3])
  for text in ("def", "96", "-1"):
    with pytest.raises(UserError, match=f"'{text}' is none of its ids; write ids below 96"):
      t.encode(text)


def test_an_empty_model_is_none(tmp_path, capfd):
  (tmp_path / "empty.model").touch()
  with pytest.raises(UserError, match="empty.model' is not a sentencepiece model; give a .model file"):
    make_tokenizer(str(tmp_path / "empty.model"))
  assert capfd.readouterr().err == ""  # the library's own lines, too
