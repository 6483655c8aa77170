"""Figures of rows of the ledger: what two stacks specialise in, stable rates, transfer between digits."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.st_moe import specialisation
from experiments.switch import stability
from experiments.v_moe import measure
from sparse_experts.moe import Tokens, TopKRouter

ARM = {"stream": "languages", "steps": 4, "place": "attention", "dtype": "float32", "precision": "float32"}


def test_entropy_by_hand():
  assert specialisation.entropy(np.array([0, 0, 1, 1]), 4) == pytest.approx(math.log(2))
  assert specialisation.entropy(np.array([3, 3]), 4) == 0


@pytest.mark.parametrize("specialised", [True, False])
def test_sentinels_and_classes_of_one_layer(specialised):
  """1,000 tokens, a tenth of them sentinels: with experts of their own, or by lot."""
  rng = np.random.default_rng(0)
  token_N = rng.integers(0, 10, 1000)  # 0: sentinel; 1 to 4: digits; 5 to 9: letters
  class_V = np.array(["mark"] + ["digit"] * 4 + ["letter"] * 5)
  by_class_N = np.select([token_N == 0, token_N < 5], [0, 1], 2)
  expert_N = by_class_N if specialised else rng.integers(0, 3, 1000)
  found = specialisation._of_layer(
      {"expert": expert_N, "token_id": token_N, "example": np.arange(1000) // 10}, class_V, [0], 3)
  if specialised:
    share = np.bincount(by_class_N) / 1000
    assert found["entropy"] == 0
    assert found["above_chance"] == pytest.approx((share * np.log(share)).sum(), abs=0.05)  # of 100 draws
    assert found["classes"] == pytest.approx(1, abs=0.01)  # 0.01: what permutations of 900 tokens tell
  else:
    assert found["entropy"] == pytest.approx(math.log(3), abs=0.05)
    assert abs(found["above_chance"]) < 0.05 and abs(found["classes"]) < 0.01


def test_the_arms_of_a_seed_are_one_run(monkeypatch):
  asked = []

  def figures(router, seed, quick):
    asked.append((router, seed))
    return {"encoder/01": {"entropy": 1.0}, "encoder/03": {"entropy": 2.0}, "decoder/01": {"entropy": 5.0}}

  monkeypatch.setattr(specialisation, "_figures", figures)
  entropy = lambda stack: specialisation.sentinel_entropy({"stack": stack}, 7, False)
  assert (entropy("encoder"), entropy("decoder")) == (1.5, 5.0)
  assert set(asked) == {("top_k", 7)}


@pytest.mark.parametrize("router", specialisation.ROUTERS)
def test_a_group_has_as_many_tokens_in_both_stacks(router):
  config = specialisation.config_of(router, 3, quick=True)
  assert config.model.group_size == config.model.decoder.group_size and config.train.seed == 3


@pytest.mark.parametrize("losses, wanted", [
    ([1.0, 1.0, 2.0], -4.5),  # half of the way from 1 to 2, 1.5 being the mean of guessing and floor
    ([1.0, 1.0, float("nan"), 1.0], -5), ([2.0, 1.0], None), ([1.0] * 11, 4)])
def test_the_largest_rate_that_trains(monkeypatch, losses, wanted):
  """What trains beyond a rate that does not counts for nothing."""
  setting = SimpleNamespace(stream=SimpleNamespace(targets=8, floor=3 - math.log(8)))
  asked = []

  def run(rate, seed):
    asked.append(rate)
    return {"loss": losses[len(asked) - 1]}

  monkeypatch.setattr(stability, "_program", lambda arm, quick: SimpleNamespace(setting=setting, run=run))
  assert stability.log2_stable_rate(ARM, 0, False) == wanted
  assert asked == [2.0**n for n in range(-6, -6 + len(asked))]


def test_a_rounded_router_is_not_the_float32_one():
  x_GTD = jax.random.normal(jax.random.key(0), (1, 64, 32))
  make = lambda of: of(32, 8, rngs=nnx.Rngs(params=jax.random.key(1)))
  exact, rounded = (make(of)(x_GTD, Tokens(mask=jnp.ones((1, 64), bool)), None, None)
                    for of in (TopKRouter, stability.RoundedRouter))
  assert 1e-6 < float(jnp.abs(exact.prob - rounded.prob).max()) < 0.01
  np.testing.assert_array_equal(rounded.gate, rounded.gate.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("place", ["attention", "ffn"])
def test_a_block_is_causal_and_has_one_sparse_layer(place):
  """A later token of a sequence changes no earlier logits; the other sequences see nothing of it."""
  program = stability._program(stability.text(ARM | {"place": place}), quick=True)
  params, buffers = program.template.init(jax.random.key(0))
  x_GTD = jax.random.normal(jax.random.key(1), (1, 64, program.setting.stream.embed_dim))
  look = lambda x_GTD: program.template.bind(params, buffers)(x_GTD, Tokens(mask=jnp.ones((1, 64), bool)))
  before, routings = look(x_GTD)
  after, _ = look(x_GTD.at[0, 12].add(1.0))
  changed = np.flatnonzero(np.abs(before - after).max(-1)[0] > 1e-6)
  assert changed.min() == 12 and changed.max() < 16  # sequences have eight tokens
  assert routings["layer"].prob.shape[-1] == program.setting.experts


@pytest.mark.parametrize("moved", [False, True])
def test_classes_that_are_transferred_were_not_seen(moved):
  """Some of the 1,797 digits are equal; moved, each of the classes that are trained on is at four places."""
  names = lambda images: {image["name"].partition(",")[0] for image in images}
  seen = (measure.seen_classes_moved if moved else measure.seen_classes)(None)
  source = measure._unseen(moved)
  parts = [names(seen), names(source.train), names(source.valid)]
  assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
  assert len(seen) == len(parts[0]) * (4 if moved else 1)
  assert {image["label"] for image in source.valid} == set(range(5)) and source.domains == tuple("56789")
  assert seen[0]["image"].shape == source.train[0]["image"].shape == ((12, 12, 3) if moved else (8, 8, 3))


def test_pixels_are_a_baseline_that_knows_something():
  """Far above a guess among five, and no network is trained."""
  assert 60 < measure.transfer({"features": "pixels"}, 0, quick=True) < 100


def test_where_digits_lie_anywhere_pixels_know_little():
  assert 20 < measure.transfer({"features": "pixels", "moved": True}, 0, quick=True) < 40
