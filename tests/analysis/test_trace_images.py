"""A trace of images and of pairs: positions are patches and words, domains classes and modalities."""

import jax
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.analysis.probe import probe
from sparse_experts.analysis.trace import trace
from sparse_experts.models import build
from sparse_experts.tasks import task_of
from sparse_experts.training.run import Run
from tests.tasks.test_images import digits_config
from tests.tasks.test_pairs import pairs_config


def random_run(config) -> Run:
  """With random weights, large enough that routing is uneven."""
  vocabulary, rng = task_of(config).make_vocabulary(), np.random.default_rng(0)
  model = build(config, vocabulary.vocab_size)
  params, buffers = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.3, x.shape), x.dtype), params)
  return Run(config, 0, params, buffers, vocabulary, partitioning.make_mesh(), "")


# What a config's rows are: (record, position) -> (token id, domain).
IMAGE = lambda record, position: (-1, record["targets"][0])
PAIR = lambda record, position: (-1, 0) if position < 4 else (record["texts"][position - 4], 1)
CASES = {"images": (digits_config, IMAGE, 5), "pairs": (pairs_config, PAIR, 16)}


@pytest.mark.parametrize("name", ["images", pytest.param("pairs", marks=pytest.mark.slow)])
def test_rows_are_those_of_a_loop_over_the_routings(name):
  """Six records, of which the last group is filled up; captions of pairs differ in length."""
  make_config, row_of, length = CASES[name]
  run = random_run(make_config())
  batch = probe(run, 6)
  found = trace(run, batch, "eval_capacity")
  filled = {field: np.pad(a, ((0, 2),) + ((0, 0),) * (a.ndim - 1)) for field, a in batch.items()}
  _, routings = run.model(filled, trace=True, kind="eval_capacity")
  expected, dropped = {}, 0
  for layer, r in jax.device_get(routings).items():
    dropped += r.metrics["dropped"][0]
    seen = {}
    for g in range(r.token.shape[0]):
      for a in range(r.token.shape[1]):
        example, position = divmod(g * run.config.model.group_size + int(r.token[g, a]), length)
        record = {field: rows[example] for field, rows in filled.items()}
        is_word = name == "pairs" and position >= 4
        if not record["weights"] or (is_word and not record["text_mask"][position - 4]):
          continue
        rank = seen[example, position] = seen.get((example, position), -1) + 1
        expected[layer, example, position, rank] = (
            *row_of(record, position), r.expert[g, a], r.valid[g, a], r.kept[g, a])
  keys = list(zip(*(found[c].tolist() for c in ("layer", "example", "position", "rank"))))
  assert keys == sorted(expected) and dropped > 0
  for i, column in enumerate(("token_id", "domain", "expert", "valid", "kept")):
    np.testing.assert_array_equal(found[column], [expected[key][i] for key in keys], err_msg=column)
  assert np.isnan(found["token_loss"]).all() and np.isfinite(found["entropy"]).all()
  if name == "pairs":
    assert (batch["text_mask"].sum(1) < 12).any()


def test_a_patch_is_drawn_where_it_lies():
  """The digits' tokens: a class token, then patches of 4 x 4 pixels, row by row."""
  task = task_of(digits_config())
  image = np.linspace(-1, 1, 8 * 8 * 3, dtype=np.float32).reshape(8, 8, 3)
  assert task.patch({"images": image}, 0) is None and task.patch({"images": image}, 5) is None
  drawn = task.patch({"images": image}, 3)  # the lower left one
  as_bytes = lambda x: np.clip(np.round((x + 1) * 127.5), 0, 255)
  np.testing.assert_array_equal(drawn[4:8, 4:8], as_bytes(image[4:8, :4]))
  np.testing.assert_array_equal(drawn[:4, 4:8], as_bytes(0.4 * image[:4, :4]))  # above, dimmed
  assert drawn.shape == (12, 12, 3) and (drawn[:, :4] == 128).all()  # beyond the image
  assert task.places("encoder/01", 5) == ["class token", *(
      f"row {y}, column {x}" for y in range(2) for x in range(2))]
