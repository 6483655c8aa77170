"""Labels asked of a model that is written down: it says again what followed a token the last time."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.analysis import prompted
from sparse_experts.data import make_tokenizer
from sparse_experts.data.labelled import sources
from sparse_experts.errors import UserError
from tests.training.tiny import tiny_config

TEXTS = [(f"{'abc'[i % 3]}{i}", ("no", "shy", "four")[i % 3]) for i in range(30)]
CONFIG = tiny_config(data__length=96, data__valid_share=0.3)
SOURCE = sources.as_source(TEXTS, CONFIG.data)


class Echo:
  """After a token, the one that followed its last occurrence, with a logit of 9; else all are alike."""

  sparse_layers = {}  # noqa: RUF012
  vocab_size = make_tokenizer("bytes").vocab_size

  def row_quantum(self, record, shards):
    return shards

  def apply(self, params, buffers, batch):
    return self._logits(batch["decoder_inputs"], 0), {}

  def init_cache(self, rows, length):
    return {"ids": jnp.full((rows, length), -1), "index": 0}

  def decode(self, params, buffers, cache, ids_BL, mask_BL=None):
    ids_BL = ids_BL if mask_BL is None else jnp.where(mask_BL, ids_BL, -1)
    at, L = cache["index"], ids_BL.shape[1]
    ids_BM = cache["ids"].at[:, at:at + L].set(ids_BL)
    return self._logits(ids_BM[:, :at + L], at), {"ids": ids_BM, "index": at + L}

  def _logits(self, ids_BM, start):
    place_M = jnp.arange(ids_BM.shape[1])
    before_1MM = (place_M[:, None] > place_M[None, :])[None]
    same_BMM = (ids_BM[:, :, None] == ids_BM[:, None, :]) & before_1MM
    last_BM = jnp.where(same_BMM, place_M[None, None], -1).max(-1)
    next_BM = jnp.take_along_axis(ids_BM, last_BM + 1, axis=1)
    found_BM = jnp.where(last_BM >= 0, next_BM, -1)[:, start:]
    return 9.0 * (found_BM[..., None] == jnp.arange(self.vocab_size)[None, None])


def echo(config=CONFIG):
  return types.SimpleNamespace(config=config, tokenizer=make_tokenizer("bytes"), params={}, buffers={},
                               mesh=partitioning.make_mesh(), abstract_model=lambda kind: Echo())


def test_an_echo_says_the_label_of_the_last_example():
  """So its accuracy is the share of that label; without an example the shortest is the likeliest."""
  order = np.random.default_rng(3).permutation(len(SOURCE.train))
  found = prompted.prompted(echo(), SOURCE, [0, 2], seed=3)
  share = lambda label: np.mean([item["label"] == label for item in SOURCE.valid])
  assert found["few_shot/2/accuracy"] == pytest.approx(share(SOURCE.train[order[1]]["label"]))
  assert found["few_shot/2/exact_match"] == found["few_shot/2/accuracy"] > 0
  assert found["few_shot/0/accuracy"] == pytest.approx(share(SOURCE.domains.index("no")))
  assert found["few_shot/texts"] == len(SOURCE.valid) and found["few_shot/majority"] == pytest.approx(1 / 3)
  assert prompted.prompted(echo(), SOURCE, [0, 2], seed=3) == found
  fewer = prompted.prompted(echo(), SOURCE, [2], seed=3, most=4)
  assert fewer["few_shot/texts"] == 4


def test_the_prompt_that_is_asked(monkeypatch):
  """Examples of more shots begin with those of fewer; each is the prompt with its label behind a space."""
  seen = []
  make = prompted.datasets.make_dataset
  monkeypatch.setattr(prompted.datasets, "make_dataset", lambda *args, **keys: (
      seen.append(keys["before"]), make(*args, **keys))[1])
  figures = dict.fromkeys(prompted.FIGURES, 0.0)
  monkeypatch.setattr(prompted, "Evaluator", lambda *_: lambda *_, **keys: figures)
  prompted.prompted(echo(), SOURCE, [1, 2], seed=1, most=1)
  order = np.random.default_rng(1).permutation(len(SOURCE.train))
  one, two = (f"{SOURCE.train[i]['text'].decode()}\nlabel: {SOURCE.domains[SOURCE.train[i]['label']]}\n\n"
              for i in order[:2])
  assert seen == [one.encode(), (one + two).encode()]


@pytest.mark.parametrize("shots, message", [
    ([99], "99 shots: the source has .* training texts; ask for so many or fewer"),
    ([20], "data.length=96 holds the prompt's .* tokens and an answer of 5, but no text; raise it, or")])
def test_shots_that_cannot_be(shots, message):
  with pytest.raises(UserError, match=message):
    prompted.prompted(echo(), SOURCE, shots)


def test_words_for_labels_of_the_runs_own_data_need_not_be_there(tmp_path):
  (tmp_path / "a.csv").write_text("a,x\nb,y\nc,x\nd,y\n")
  keys = dict(data__label_words="pos=good,neg=bad", data__valid_share=0.5)
  tuned = tiny_config(data__objective="text_classification", **keys)
  assert prompted.open_source(tuned, f"files:{tmp_path}").domains == ("x", "y")
  with pytest.raises(UserError, match="has no label 'pos'; known: x, y"):
    prompted.open_source(tiny_config(**keys), f"files:{tmp_path}")


def test_a_vocabulary_without_words_cannot_be_asked():
  with pytest.raises(UserError, match="data.tokenizer='vocabulary:100' has no words for labels"):
    prompted.prompted(echo(tiny_config(data__tokenizer="vocabulary:100")), SOURCE, [0])
