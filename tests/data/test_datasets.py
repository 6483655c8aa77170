"""Record i is a fact: the same in every run, in every process, however it is reached."""

import numpy as np
import pytest

from sparse_experts.config import default_config
from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of

TOKENIZER = make_tokenizer("bytes")
DOCUMENTS = [dict(text=(f"Document {i}: ".encode() + bytes(range(97, 123)) * (1 + i % 5)), domain=i % 2)
             for i in range(60)]


def make(split="train", objective="causal", **changes):
  c = default_config()
  c.data.update(dict(length=32, valid_share=.2, objective=objective, mean_span=2.0))
  for key, value in changes.items():
    section, name = key.split("_", 1)
    c[section][name] = value
  return task_of(c).make_dataset(split, TOKENIZER, task_of(c).as_source(DOCUMENTS))


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


objectives = pytest.mark.parametrize("objective", ["causal", "span_corruption"])


@objectives
@pytest.mark.parametrize("split", ["train", "valid"])
def test_records_depend_on_their_number_alone(objective, split):
  first, second = make(split, objective), make(split, objective)
  n = min(first.num_windows, 40)
  backwards = {i: second[i] for i in reversed(range(n))}
  assert all(same(first[i], backwards[i]) for i in range(n))


@objectives
def test_an_example_is_as_a_record(objective):
  c = default_config()
  c.data.update(dict(length=32, objective=objective, mean_span=2.0))
  looks = lambda record: {name: (np.shape(a), np.asarray(a).dtype) for name, a in record.items()}
  assert looks(task_of(c).example(TOKENIZER)) == looks(make(objective=objective)[0])


@objectives
def test_each_epoch_holds_every_window_once_in_a_new_order(objective):
  data = make(objective=objective)
  n = data.num_windows
  key = "targets" if objective == "causal" else "encoder_inputs"
  epochs = [[data[i][key].tobytes() for i in range(e * n, e * n + n)] for e in range(3)]
  assert len({tuple(e) for e in epochs}) == 3
  if objective == "causal":
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
  else:  # spans are drawn anew in each epoch
    assert len({*epochs[0], *epochs[1], *epochs[2]}) > 2 * n


@objectives
def test_seed_of_the_run_changes_train_and_not_valid(objective):
  train = [make(objective=objective, train_seed=s) for s in (0, 1)]
  valid = [make("valid", objective, train_seed=s) for s in (0, 1)]
  assert not all(same(train[0][i], train[1][i]) for i in range(5))
  assert len(valid[0]) == len(valid[1]) == valid[0].num_windows
  assert all(same(valid[0][i], valid[1][i]) for i in range(len(valid[0])))


def test_valid_holds_every_window_once():
  c = default_config()
  c.data.update(dict(length=32, valid_share=.2))
  source = task_of(c).as_source(DOCUMENTS)
  data = task_of(c).make_dataset("valid", TOKENIZER, source)
  records = [data[i] for i in range(len(data))]
  assert sum(int(r["target_bytes"].sum()) for r in records) == sum(len(d["text"]) for d in source.valid)
  # The first half is a sample of the whole list: both domains are in it.
  assert {int(r["domain"]) for r in records[:len(records) // 2]} == {0, 1}


@objectives
def test_documents_end_with_eos_in_causal_records_only(objective):
  c = default_config()
  c.data.update(dict(length=32, valid_share=.2, objective=objective))
  source = task_of(c).as_source(DOCUMENTS)
  data = task_of(c).make_dataset("valid", TOKENIZER, source)
  ends = sum(int((data[i]["targets"] == TOKENIZER.eos_id).sum()) for i in range(len(data)))
  assert ends == (len(source.valid) if objective == "causal" else len(data))


def test_how_many_records_hold_so_many_bytes():
  data, c = make("valid"), default_config()
  bytes_R = np.cumsum([data[i]["target_bytes"].sum() for i in range(len(data))])
  for asked, records in ((1, 1), (bytes_R[6], 7), (bytes_R[6] + 1, 8), (10**9, len(data))):
    c.eval.min_bytes = int(asked)
    assert task_of(c).evaluated_records(data) == records


@objectives
def test_shapes_are_known_before_the_data(objective):
  data = make(objective=objective)
  c = default_config()
  c.data.update(dict(length=32, objective=objective, mean_span=2.0))
  size = task_of(c).row_lengths(TOKENIZER)
  assert data[0]["targets"].shape == (size["targets"],)
  assert data[0].get("encoder_inputs", np.zeros(0)).shape == (size["encoder"],)
  full = [data[i] for i in range(10)]
  assert all(r["targets"].shape == data[0]["targets"].shape for r in full)
  if objective == "span_corruption":
    assert sum(int(r["encoder_segments"].all()) for r in full) >= 8  # full but for the tails of domains


def test_target_length_pads():
  data = make(objective="span_corruption", data_target_length=48)
  assert data[3]["targets"].shape == (48,) and data[3]["weights"][-1] == 0


def test_random_access_has_an_end():
  data = make("valid")
  with pytest.raises(IndexError):
    data[len(data)]
  with pytest.raises(IndexError):
    make()[-1]


@pytest.mark.parametrize(("change", "words"), [
    (dict(objective="casual"), "data.objective='casual' is unknown; did you mean 'causal'"),
    (dict(data_length=0), "data.length=0 must be at least 1"),
    (dict(objective="span_corruption", data_target_length=4), "data.target_length=4 does not hold the spans"),
    (dict(split="test"), "split 'test' is unknown; known: train, valid"),
])
def test_mistakes(change, words):
  with pytest.raises(UserError, match=words):
    make(**change)
