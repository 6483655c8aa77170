"""Samples continue or fill; the cache and the loop add nothing of their own."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from sparse_experts.config import replaced
from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.models.build import build
from sparse_experts.partitioning import make_mesh
from sparse_experts.training import sample as s
from sparse_experts.training.run import Run
from sparse_experts.training.sample import sample
from tests.training.tiny import tiny_config


def test_masks_are_numbered_around_those_in_use():
  assert s.number_masks("a <mask> b <extra_id_0> c <mask>") == "a <extra_id_1> b <extra_id_0> c <extra_id_2>"


def test_spans_go_where_their_sentinels_are():
  marked = "def <extra_id_0>(x): return <extra_id_1> + <extra_id_2>"
  drawn = "junk<extra_id_1> x<extra_id_0>f<extra_id_1> again"
  assert s.put_in(marked, drawn) == "def f(x): return  x + <extra_id_2>"


def test_greedy_sample_is_the_likeliest_continuation(whole):
  """Each drawn token is the argmax of the whole text fed at once, without a cache."""
  run = dataclasses.replace(whole[1], params=jax.tree.map(lambda x: 4 * x, whole[1].params))
  prompt = "import "  # larger weights: what is likeliest depends on everything before
  text = sample(run, prompt, length=6, temperature=0)
  assert text.startswith(prompt)
  drawn = s._draw(run, np.concatenate([[0], run.tokenizer.encode(prompt)]).astype(np.int32), 6, 0, None)[:6]
  ids = np.concatenate([[0], run.tokenizer.encode(prompt), drawn]).astype(np.int32)
  batch = {"decoder_inputs": ids, "segments": np.ones_like(ids), "positions": np.arange(len(ids))}
  logits, _ = run.model({k: v[None] for k, v in batch.items()})
  likeliest = np.asarray(logits[0]).argmax(-1)
  end = np.flatnonzero(drawn == run.tokenizer.eos_id)
  upto = len(drawn) if not len(end) else end[0] + 1
  assert len(set(drawn[:upto])) > 2
  np.testing.assert_array_equal(likeliest[len(ids) - len(drawn) - 1:][:upto], drawn[:upto])


def test_a_prompt_that_is_cut_is_reported(whole, capsys, monkeypatch):
  """A model reads as many tokens as it was trained on, a converted one as many as it says itself."""
  read = []
  monkeypatch.setattr(s, "_draw", lambda run, start_L, *rest: read.append(len(start_L)) or start_L[:0])
  own = dataclasses.replace(whole[1], config=replaced(whole[1].config, {"model.context_length": 64}))
  trained = whole[1]
  for run, length, said in ((trained, 31, ""),
                            (trained, 100, "100 tokens and this model reads 31; the first 69"),
                            (own, 63, ""),
                            (own, 2100, "2,100 tokens and this model reads 63; the first 2,037")):
    sample(run, "x" * length)
    assert capsys.readouterr().err == (said and f"the prompt has {said} are left out\n")
  assert read == [32, 32, 64, 64]  # with the token that begins a row


@pytest.mark.slow
def test_temperature_draws_by_seed(whole):
  _, run = whole
  draw = lambda seed: sample(run, "x" * 100, length=12, temperature=2.0, seed=seed)  # longer than the windows
  assert draw(0) == draw(0) != draw(1)


@pytest.mark.slow
def test_fills_masked_spans():
  config = tiny_config(model__name="seq2seq", data__objective="span_corruption")
  tokenizer = make_tokenizer("bytes")
  params, buffers = jax.jit(build(config, tokenizer.vocab_size).init)(jax.random.key(0))
  run = Run(config, 0, params, buffers, tokenizer, make_mesh(), "")
  text = sample(run, "import <mask> as", length=5, temperature=0)
  assert text.startswith("import ") and text.endswith(" as")
  # The end of text is the likeliest everywhere: each span still gets its token, and each its sentinel.
  filled = sample(run, "a <mask> b <mask> c <extra_id_7> d", length=3, temperature=0)
  parts = re.fullmatch(r"a (.+) b (.+) c (.+) d", filled, re.DOTALL)
  assert parts and "<extra_id_" not in filled, filled
  with pytest.raises(UserError, match="marks no span to fill; write <mask>"):
    sample(run, "import this")
  with pytest.raises(UserError, match="more than the data.length=32"):
    sample(run, "<mask>" + "x" * 40)
