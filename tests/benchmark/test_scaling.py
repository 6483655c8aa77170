"""Series of tiny layers, and every router once."""

import dataclasses

import jax
import numpy as np
import pytest

from sparse_experts.benchmark import layer, routers, scaling, timing
from sparse_experts.moe import ROUTERS
from tests.training.test_measures import undefined

TINY = dataclasses.replace(scaling.BASE, tokens=32, embed_dim=8, expert_dim=16, group_size=16)


def test_what_grows(monkeypatch):
  """Times made up: a floor of 2 ms, a router of 1, a layer of 3 + E / 4; twice the tokens, twice all."""
  calls = []

  def interleave(programs, runs):
    calls.append(programs)
    layer_program = programs["ragged"]
    G, T, _ = layer_program.arguments[-2].shape
    E = layer_program.arguments[-1]["router"]["w"].shape[-1]
    made_up = {"floor": 2.0, "router": 1.0, "ragged": 3.0 + E / 4}
    return {name: timing.Sample(np.full(runs, ms * G * T / 32)) for name, ms in made_up.items()}

  monkeypatch.setattr(scaling, "interleave", interleave)
  rows = []
  found = scaling.measure(2, ["ragged"], base=TINY, num_experts=(8, 16), tokens=(32, 64), say=rows.append)
  assert rows == found["by_experts"] + found["by_tokens"] and len(calls) == 4
  assert [r["dispatches"]["ragged"]["overhead_ms"] for r in found["by_experts"]] == [3, 5]
  assert found["growth"] == {"ragged": {
      "overhead_growth": pytest.approx(5 / 3), "dispatch_growth": 2.0, "token_growth": 1.0}}
  keys = {*found["growth"]["ragged"], *rows[0], *rows[0]["dispatches"]["ragged"]}
  assert not undefined(keys - {"num_experts", "tokens", "dispatches"})


def test_every_router_is_timed(monkeypatch):
  """Forward and backward of each on the same tokens; the times themselves are made up here."""
  programs = {}

  def interleave(given, runs):
    programs.update(given)
    order = {name: i + 1.0 for i, name in enumerate(given)}
    return {name: timing.Sample(np.full(runs, ms)) for name, ms in order.items()}

  monkeypatch.setattr(routers, "interleave", interleave)
  names = ["top_k", "expert_choice", "reinforce", "permuted"]
  found = routers.measure(2, names, groups=2, group_size=16, embed_dim=8, num_experts=4)
  assert list(found["routers"]) == names
  assert found["routers"]["expert_choice"]["over_top_k"] == 4 / 2
  assert not undefined(set(found["routers"]["top_k"]) - {"k"})
  (gate, log_prob, value, _), _, gradients = programs["reinforce", "forward_backward"]()
  assert gate.shape == log_prob.shape == value.shape == (2, 16)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_all_of_the_registry():
  assert set(routers.measure(1, groups=2, group_size=128, embed_dim=8)["routers"]) == set(ROUTERS)


@pytest.mark.slow
def test_all_dispatches_of_a_series():
  found = scaling.measure(2, base=TINY, num_experts=(8, 16), tokens=(16, 32))
  assert set(found["growth"]) == set(layer.WORKLOADS["switch"].dispatches)
