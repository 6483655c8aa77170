"""Labelled texts: forms of files, labels in words, the split, and rows whose targets are the answer alone."""

import gzip
import json
import types
import zipfile

import numpy as np
import pytest

from sparse_experts.config import default_config
from sparse_experts.data import make_tokenizer
from sparse_experts.data.labelled import datasets, sources
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of

ROWS = [("good, \"very\" good", "pos"), ("bad", "neg"), ("fine", "pos"), ("poor", "neg")]
FORMS = {
    "a.csv": 'text,label\n"good, ""very"" good",pos\nbad,neg\n\nfine,pos\npoor,neg\n',
    "b.csv": '"good, ""very"" good",pos\nbad,neg\nfine,pos\npoor,neg\n',
    "c.csv": 'category,id,sentence\npos,1,"good, ""very"" good"\nneg,2,bad\npos,3,fine\nneg,4,poor\n',
    "d.tsv": 'good, "very" good\tpos\nbad\tneg\nfine\tpos\npoor\tneg\n',
    "e.json": json.dumps(ROWS),
    "f.jsonl": "\n".join(json.dumps({"text": text, "intent": label}) for text, label in ROWS),
}
BYTES = make_tokenizer("bytes")


def config_of(**keys):
  c = default_config().unlock()
  c.data.update(dict(objective="text_classification", length=32, valid_share=0.5, **keys))
  return c


def read(path, **keys):
  return sources.open_source(config_of(source=f"files:{path}", **keys).data)


def rows_of(source):
  return sorted((item["text"].decode(), source.domains[item["label"]])
                for item in (*source.train, *source.valid))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_table_holds_the_same(tmp_path, name):
  path = tmp_path / name
  path.write_text(FORMS[name])
  source = read(path)
  assert rows_of(source) == sorted(ROWS) and source.domains == ("neg", "pos")
  packed = tmp_path / f"{name}.gz"
  packed.write_bytes(gzip.compress(FORMS[name].encode()))
  assert read(packed).fingerprint == source.fingerprint


def test_a_text_file_of_each_label(tmp_path):
  """Labels are the names of the files; other files of the folder, or of a .zip, are not read."""
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "is_good.txt").write_text("good\n\nfine\n")
  (tmp_path / "set" / "bad.txt.gz").write_bytes(gzip.compress(b"bad\npoor"))
  (tmp_path / "set" / "README.origin").write_text("no text")
  with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
    for path in (tmp_path / "set").iterdir():
      archive.write(path, path.name.removesuffix(".gz")) if path.suffix != ".gz" else archive.writestr(
          "bad.txt", "bad\npoor")
  for path in (tmp_path / "set", tmp_path / "set.zip"):
    found = rows_of(read(path))
    assert found == [("bad", "bad"), ("fine", "is good"), ("good", "is good"), ("poor", "bad")]
  renamed = read(tmp_path / "set", label_words="is_good=positive, bad=not positive")
  assert renamed.domains == ("not positive", "positive")
  assert renamed.fingerprint != read(tmp_path / "set").fingerprint


def test_parts_that_files_or_a_json_name(tmp_path, caplog):
  (tmp_path / "train.csv").write_text("a,x\nb,y\n")
  (tmp_path / "test_half.csv").write_text("c,x\n")
  source = read(tmp_path)
  assert [item["text"] for item in source.train] == [b"a", b"b"]
  assert [item["text"] for item in source.valid] == [b"c"]
  one = tmp_path / "all.json"
  one.write_text(json.dumps({"test": [["d", "x"]], "val": [["c", "x"]], "train": [["a", "x"], ["b", "y"]]}))
  source = read(one)
  assert [item["text"] for item in source.valid] == [b"c"] and len(source.train) == 2
  assert "the parts test are left out; train and val are read" in caplog.text


def test_a_split_holds_out_some_of_each_label():
  texts = [(f"text {i}", "ab"[i % 2]) for i in range(40)] + [("text 3", "b"), ("alone", "c")]
  data = config_of().data
  data.valid_share = 0.2
  source = sources.as_source(texts, data)
  count = lambda part: [sum(item["label"] == n for item in part) for n in range(3)]
  assert count(source.valid)[::2] == [4, 0] and count(source.train)[2] == 1
  assert not {i["text"] for i in source.train} & {i["text"] for i in source.valid}  # copies stay together
  again = sources.as_source(texts[::-1], data)
  assert {i["text"] for i in again.valid} == {i["text"] for i in source.valid}


def test_holding_out_for_tuning_keeps_the_labels():
  config = config_of(label_words="a=first")
  task = task_of(config)
  source = task.as_source([(f"text {i}", "ab"[i % 2]) for i in range(40)])
  inner = task.hold_out(source)
  assert source.domains == inner.domains == ("b", "first")
  assert len(inner.train) + len(inner.valid) == len(source.train)


@pytest.mark.parametrize("data, message", [
    ([("a", "x"), "b"], "data: labelled text 1 is not a text with a label; give \\(text, label\\)"),
    ([{"text": "a"}], "data: labelled text 0 is not a text with a label"),
    ([("a", 3)], None),
    (types.SimpleNamespace(train=[("a", 2)], valid=[("a", 0)], domains=("x", "y")),
     "data.train: labelled text 0 has label 2, but there are 2; name them all"),
    ([("a", " "), ("b", "x")], "data: labelled text 0 has an empty label; name it"),
    ([("a", "x")], "data has no validation labelled texts; give it at least two of a label"),
])
def test_data_of_ones_own(data, message):
  if message is None:
    numbered = sources.as_source([("a", 3), ("b", 3), ("c", 5), ("d", 5)], config_of().data, name="data")
    assert numbered.domains == ("3", "5")
    return
  with pytest.raises(UserError, match=f"^{message}"):
    sources.as_source(data, config_of().data, name="data")


@pytest.mark.parametrize("name, text, message", [
    ("a.csv", "text,label\na\n", "data.source='files:.*a.csv': row 0 has 1 columns; give two"),
    ("a.csv", "a,b,c\n", "row 0 has 3 columns; give two, text and label, or a header that names them"),
    ("a.json", "{", "a.json' is no JSON \\(.*\\); mend it"),
    ("a.json", '{"train": 3}', "has int in place of rows; give a list of \\[text, label\\]"),
    ("a.json", '[["a", "b", "c"]]', "row 0 is not a text and a label; give \\[text, label\\], or an object"),
    ("a.jsonl", '{"text": "a"}', "row 0 is not a text and a label"),
    ("a.jsonl", '["a", "b"]\nx', "row 1 is no JSON"),
    ("a.md", "a", "holds no labelled texts; give a .csv, .tsv, .json or .jsonl of texts and labels, or"),
    ("a.csv", "a,x\nb,x\n", "has one label only, 'x'; give it two or more"),
])
def test_a_file_that_is_no_table_is_named(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message):
    read(tmp_path)


@pytest.mark.parametrize("keys, message", [
    (dict(prompt="no place"), r"data.prompt='no place' has 0 places for the text; write \{text\} once"),
    (dict(prompt="{text}{text}"), "has 2 places for the text"),
    (dict(label_words="pos"), "data.label_words='pos': 'pos' is not LABEL=WORDS; write for example"),
    (dict(tokenizer="vocabulary:100"), "data.tokenizer='vocabulary:100' has no words for labels; choose"),
])
def test_settings_that_cannot_be(keys, message):
  with pytest.raises(UserError, match=message):
    task_of(config_of(**keys)).check()


def test_a_label_that_is_not_there_and_embedded_text(caplog):
  other = sources.as_source(ROWS, config_of(label_words="pos=good,joy=bad").data, name="data")
  assert other.domains == ("good", "neg") and "data has no label 'joy'; known: neg, pos" in caplog.text
  with pytest.raises(UserError, match="data has no label 'posi'; did you mean 'pos'"):
    sources.as_source(ROWS, config_of(label_words="posi=good").data, name="data")
  with pytest.raises(UserError, match="data.source='embedded' has no labels; give files:PATH of a table"):
    sources.open_source(config_of().data)


def test_a_decoders_row_by_hand():
  config = config_of(prompt="<{text}>")
  rows = datasets.AnswerRows(config, BYTES)
  (answer,) = rows.answers(["ok"])
  assert answer.tolist() == [*BYTES.encode(" ok"), BYTES.eos_id]
  (prompt,) = rows.prompts([b"abc"], len(answer))
  record = rows.record(prompt, answer, 7)
  text = BYTES.encode("<abc> ok").tolist()
  inputs, targets = [BYTES.bos_id, *text], [*text, BYTES.eos_id]
  n = len(inputs)
  assert record["decoder_inputs"].tolist() == inputs + [0] * (32 - n)
  assert record["targets"].tolist() == targets + [0] * (32 - n)
  assert record["weights"].tolist() == [0] * 5 + [1] * 4 + [0] * (32 - n)
  assert record["target_bytes"].tolist() == [0] * 5 + [1, 1, 1, 0] + [0] * (32 - n)
  assert record["segments"].tolist() == [1] * n + [0] * (32 - n)
  assert (record["label"], record["domain"]) == (7, 0)


def test_an_encoder_decoders_rows_by_hand():
  config = config_of(target_length=6)
  config.model.name = "seq2seq"
  rows = datasets.AnswerRows(config, BYTES)
  (answer,), (prompt,) = rows.answers(["ok"]), rows.prompts([b"abc"], 4)
  record = rows.record(prompt, answer, 0)
  inputs = [*BYTES.encode("abc\nlabel:"), BYTES.eos_id]
  assert record["encoder_inputs"].tolist() == inputs + [0] * (32 - len(inputs))
  assert record["decoder_inputs"].tolist() == [0, *BYTES.encode(" ok"), 0, 0]
  assert record["targets"].tolist() == [*BYTES.encode(" ok"), 1, 0, 0]
  assert record["weights"].tolist() == [1] * 4 + [0] * 2
  filling = datasets.AnswerRows(config, BYTES, sentinel=True).record(prompt, answer, 0)
  mark = BYTES.sentinel(0)
  assert filling["encoder_inputs"].tolist()[:len(inputs) + 1] == [*inputs[:-1], mark, BYTES.eos_id]
  assert filling["decoder_inputs"].tolist() == [0, mark, *BYTES.encode(" ok"), 0]
  assert filling["weights"].tolist() == [0, 1, 1, 1, 1, 0]


def test_the_end_of_a_long_text_is_cut_off_and_the_longest_answer_fits(caplog):
  config = config_of(prompt="{text}:")
  rows = datasets.AnswerRows(config, BYTES)
  answers = rows.answers(["a", "long label"])
  prompts = rows.prompts([b"short", b"x" * 50], len(answers[1]))
  assert BYTES.decode(prompts[0]) == "short:"
  record = rows.record(prompts[1], answers[1], 1)
  assert record["segments"].all() and record["weights"].sum() == len(answers[1])
  assert BYTES.decode(prompts[1]) == "x" * (33 - 1 - 1 - 12) + ":"
  assert "1 of 2 texts are longer than data.length=32 holds" in caplog.text
  with pytest.raises(UserError, match="label 'x{40}' has 42 tokens, which data.length=32 does not hold;"):
    rows.answers(["a", "x" * 40])
  with pytest.raises(UserError, match="data.length=32 holds the prompt's 31 tokens and an answer of 2, b"):
    rows.prompts([b"a"], 2, before=b"x" * 30)


def test_an_answer_goes_on_from_the_prompt():
  """A tokenizer that puts a mark before each text makes the ids that whole text would have."""

  class Marking:
    eos_id, pad_id, bos_id = 1, 0, 0
    byte_lengths = np.ones(300, np.int32)

    def encode(self, text):
      return np.array([2, *(3 + b for b in text)] if text else [], np.int32)

  rows = datasets.AnswerRows(config_of(), Marking())
  assert rows.answers(["ok"])[0].tolist() == [*BYTES.encode(" ok"), 1]


def test_validation_records_hold_all_answers():
  config = config_of()
  task = task_of(config)
  source = task.as_source([(f"text {i}", ("no", "maybe")[i % 2]) for i in range(8)])
  train, valid = (task.make_dataset(split, BYTES, source) for split in ("train", "valid"))
  assert "answers" not in train[0] and train[0].keys() == task.example(BYTES).keys()
  assert valid.num_windows == len(valid) == 4
  record = valid[0]
  assert [BYTES.decode(ids[ids >= 0]) for ids in record["answers"]] == [" maybe", " no"]
  assert record["answer_bytes"].tolist() == [5, 2] and (record["answers"][1] == -1).sum() == 3
  written = record["targets"][record["weights"] > 0]
  assert written.tolist() == record["answers"][record["label"]][:len(written)].tolist()
