"""Pairs of images and texts: generated scenes, one's own, and what is wrong with them."""

import types

import numpy as np
import pytest

from sparse_experts.config import default_config
from sparse_experts.data.pairs import scenes
from sparse_experts.data.text.tokenizers import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of

GREY = np.full((4, 4), 90, np.uint8)


def make_config(source="embedded", **keys):
  c = default_config().unlock()
  c.model.name, c.model.pool = "limoe", "mean"
  c.data.update(dict(objective="contrastive", source=source, tokenizer="words", length=12, valid_share=0.1))
  c.data.update(keys)
  c.eval.batch_size = 4
  return c.lock()


def own(n=20):
  """Texts of one to three words."""
  return [dict(image=GREY + i, text=" ".join([f"w{i}"] * (1 + i % 3))) for i in range(n)]


def test_scenes_are_what_their_captions_say():
  """Colours are there, the named object on the named side; the same seed draws the same."""
  rng = np.random.default_rng(0)
  found = scenes.scenes()
  assert len({pair["text"] for pair in found}) == len(found) == 48 * 47 * 4
  for i in rng.integers(len(found), size=60):
    words = found[i]["text"].decode().replace("left of", "left").replace("right of", "right").split()
    _, size_a, colour_a, _, relation, _, size_b, colour_b, _ = words
    image = found[i]["image"]
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    if colour_a == colour_b:
      continue
    places = [np.argwhere((image == scenes.COLOURS[c]).all(-1)) for c in (colour_a, colour_b)]
    (y_a, x_a), (y_b, x_b) = (p.mean(0) for p in places)
    assert {"above": y_a < y_b, "below": y_a > y_b, "left": x_a < x_b, "right": x_a > x_b}[relation]
    if size_a == "big" and size_b == "small":
      assert len(places[0]) > len(places[1])
  again = scenes.draw(("big", "red", "circle"), "above", ("small", "blue", "cross"), np.random.default_rng(3))
  np.testing.assert_array_equal(again, scenes.draw(
      ("big", "red", "circle"), "above", ("small", "blue", "cross"), np.random.default_rng(3)))


def test_no_text_is_on_both_sides():
  config = make_config()
  source = task_of(config).open_source()
  train, valid = ({pair["text"] for pair in part} for part in (source.train, source.valid))
  assert not train & valid and 0.08 < len(valid) / len(train | valid) < 0.12
  assert task_of(config).open_source().fingerprint == source.fingerprint
  tokenizer = task_of(config).make_vocabulary(source)
  assert tokenizer.vocab_size == 128 == task_of(config).make_vocabulary().vocab_size


def test_records_by_hand():
  config = make_config(valid_share=0.4)
  source = task_of(config).as_source(own())
  tokenizer = task_of(config).make_vocabulary(source)
  task = task_of(config)
  train, valid = (task.make_dataset(part, tokenizer, source) for part in ("train", "valid"))
  texts = {pair["text"]: pair["image"][0, 0] for part in (source.train, source.valid) for pair in part}
  for dataset in (train, valid):
    for i in range(8):
      record = dataset[i]
      assert record["images"].shape == (8, 8, 3)
      assert record["texts"].shape == record["text_mask"].shape == (12,)
      text = tokenizer.decode(record["texts"][record["text_mask"]])
      if dataset is train:
        grey = texts[text.encode()]
        np.testing.assert_allclose(record["images"], grey / 127.5 - 1, rtol=1e-5)
      assert not record["texts"][~record["text_mask"]].any() and record["text_mask"][0]
  assert len(valid) == len(source.valid) // 4 * 4 == valid.num_windows == task.evaluated_records(valid)
  like = task_of(config).example(tokenizer)
  for name, a in like.items():
    assert (a.shape, a.dtype) == (np.shape(record[name]), np.asarray(record[name]).dtype)
  assert task_of(config).row_lengths(tokenizer) == dict(encoder=4 + 12, targets=0)
  epoch = lambda start: sorted(train[i]["texts"].tolist() for i in range(start, start + train.num_windows))
  assert epoch(0) == epoch(train.num_windows)
  held = task_of(config).hold_out(source)
  assert len(held.train) + len(held.valid) == len(source.train)


def test_words():
  t = make_tokenizer("words", [b"a red circle", "a big circle"])
  assert t.encode("red  big").tolist() == [6, 4]  # in the order of their spelling, from id 3 on
  assert t.encode("a small circle").tolist() == [3, t.unk_id, 5] and t.decode([3, 2, 5, 1, 3]) == "a ? circle"
  again = make_tokenizer(t.serialize())
  assert again.fingerprint == t.fingerprint and again.encode("circle").tolist() == [5]
  with pytest.raises(UserError, match="tokenizer 'words' is made of the source's text"):
    make_tokenizer("words")


def test_validation_in_whole_sets():
  config = make_config(valid_share=0.4)
  source = task_of(config).as_source(own(6))
  tokenizer = task_of(config).make_vocabulary(source)
  with pytest.raises(UserError, match="validation pairs, fewer than the eval.batch_size=4 that are told"):
    task_of(config).make_dataset("valid", tokenizer, source)


@pytest.mark.parametrize("pairs, message", [
    ([GREY], ".* pair 0 is of type ndarray, without 'image' and a 'text' of str or bytes; give a dict .*"),
    ([dict(image=GREY, text=3)], ".* pair 0 is of type dict, without .*"),
    (own() + [dict(image=GREY, text=" ")], ".* pair 20 has an empty text; leave it out"),
    ([dict(image=b"x", text="a")], r".* the image of pair 0 cannot be read \(no image that .*\); mend .*"),
    (types.SimpleNamespace(train=own(4), valid=own(1)), ".* has 1 validation pairs, none to tell .*"),
    (own(1), ".* has 1 training pairs, none to tell one from; .*"),
])
def test_what_is_wrong_with_pairs(pairs, message):
  config = make_config()
  with pytest.raises(UserError, match=f"^{message}$"):
    task_of(config).as_source(pairs)


def test_a_text_that_is_too_long():
  config = make_config(length=2, valid_share=0.4)
  source = task_of(config).as_source(own())
  tokenizer = task_of(config).make_vocabulary(source)
  with pytest.raises(UserError, match="train text [0-9]+ has 3 tokens, 'w.*', more than data.length=2; "):
    task_of(config).make_dataset("train", tokenizer, source)


@pytest.mark.parametrize("source, message", [
    ("files:/x", "data.source='files:/x' holds no pairs of image and text; write a function .*"),
    ("embeded", "data.source='embeded' is unknown; did you mean 'embedded'.*"),
])
def test_sources_without_pairs(source, message):
  with pytest.raises(UserError, match=f"^{message}$"):
    task_of(make_config(source)).open_source()
