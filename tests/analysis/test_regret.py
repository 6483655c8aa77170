"""Forced experts change the loss as a model with that one assignment changed says."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from sparse_experts.analysis.probe import probe
from sparse_experts.analysis.regret import by_confidence, forward_passes, regret, token_regret
from sparse_experts.analysis.trace import trace
from sparse_experts.errors import UserError
from sparse_experts.models.build import build
from sparse_experts.training.evaluate import interval
from tests.analysis.tiny_run import DECODER, SEQ2SEQ, bare_run, tiny_dataset, tiny_run


@functools.cache
def case():
  """(run, batch, what `say` was told, regret of second choices at places 0 and 9 of both layers)."""
  run = tiny_run(**DECODER)
  batch, told = probe(run, 3, tiny_dataset(run)), []
  return run, batch, told, regret(run, batch, positions=[9, 0], rank=1, say=told.append)


def test_every_alternative_has_a_row_and_the_chosen_one_changes_nothing():
  """Six of eight experts are alternatives: neither the first choice nor the chosen second."""
  run, batch, told, table = case()
  assert len({len(a) for a in table.values()}) == 1 and len(table["step"]) == 2 * 3 * 2 * 7
  chosen = table["forced"] == table["chosen"]
  assert chosen.sum() == 12
  assert not table["change"][chosen].any() and not table["own_change"][chosen].any()
  assert (table["change"][~chosen] != 0).all()
  rows = trace(run, batch)
  first = {key[:3]: key[3] for key in zip(*(rows[c][rows["rank"] == 0].tolist() for c in (
      "layer", "example", "position", "expert")))}
  for key in zip(*(table[c].tolist() for c in ("layer", "example", "position", "forced"))):
    assert first[key[:3]] != key[3]


def test_the_cost_is_told_before():
  run, batch, told, table = case()
  passes = -(-72 // 8)  # 12 tokens of 6 alternatives, in passes of eval.batch_size=8 rows
  assert forward_passes(run, batch, positions=[9, 0]) == passes
  assert told[0] == f"regret: 72 forced choices, {passes} forward passes"
  assert told[-1] == f"regret: {passes} of {passes} forward passes"
  tokens = (batch["segments"] > 0).sum()
  assert forward_passes(run, batch, layers=["decoder/01"]) == -(-tokens * 6 // 8)


def test_a_forced_choice_is_a_model_with_that_one_assignment_changed():
  """In layer 0, so that layer 1 routes anew. Tolerance: losses of 60 nats in float32, over 32 targets."""
  run, batch, _, table = case()
  here = np.flatnonzero((table["layer"] == "decoder/00") & (table["example"] == 1) & (table["position"] == 9)
                        & (table["forced"] != table["chosen"]))[2]
  forced = int(table["forced"][here])

  def manual(routing, layer_is_first):
    """Place 9 of row 1 is token 41 of a group of two rows; its second choice stands 64 after the first."""
    prob, first, second = routing.prob[0, 41], 41, 64 + 41
    gate = prob[forced] / (prob[routing.expert[0, first]] + prob[routing.expert[0, second]])
    at = lambda a, value: a.at[0, second].set(jax.numpy.where(layer_is_first[0, 0], value, a[0, second]))
    return routing.replace(expert=at(routing.expert, forced), gate=at(routing.gate, gate))

  model = build(run.config, run.tokenizer.vocab_size, "dropless", edit=manual)

  @jax.jit
  def losses(first):
    edits = {"decoder/00": np.full((3, 32), True) & first, "decoder/01": np.full((3, 32), False)}
    logits, _ = model.apply(run.params, run.buffers, batch, edits=edits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]) * batch["weights"]

  change = np.asarray(losses(True), np.float64) - np.asarray(losses(False), np.float64)
  np.testing.assert_allclose(table["change"][here], change[1].sum(), atol=1e-3)
  np.testing.assert_allclose(table["own_change"][here], change[1, 9], atol=1e-4)
  assert abs(table["change"][here]) > 1e-2 and np.abs(change[[0, 2]]).max() < 1e-4


def test_regret_of_a_token_is_what_its_best_expert_would_save():
  table = case()[3]
  found = token_regret(table)
  assert len(found["regret"]) == 12 and (found["regret"] >= 0).all() and found["regret"].max() > 0
  for i in range(12):
    mine = np.all([table[c] == found[c][i] for c in ("layer", "example", "position")], axis=0)
    assert found["regret"][i] == -table["change"][mine].min()
    assert found["best"][i] == table["forced"][mine][table["change"][mine].argmin()]


def test_by_confidence_by_hand():
  """Five tokens of two layers in halves of the router's probability, and of that of the token's target."""
  traced = dict(step=np.zeros(12, int), layer=np.repeat(["a", "b"], 6),
                example=np.tile([0, 0, 1, 1, 1, 1], 2), position=np.tile([0, 1, 0, 1, 1, 2], 2),
                rank=np.tile([0, 0, 0, 0, 1, 0], 2),
                prob_0=np.r_[[0.9, 0.3, 0.5, 0.6, 0.6, 0.4], np.full(6, np.nan)],
                token_loss=np.log(np.tile([8, 4, 2, 1, 1, np.nan], 2)))
  tokens = dict(step=np.zeros(6, int), layer=np.array([*"aaaaab"]), example=np.array([1, 0, 1, 0, 1, 0]),
                position=np.array([2, 1, 1, 0, 0, 1]), chosen=np.arange(6), best=np.array([0, 0, 2, 3, 4, 0]),
                regret=np.array([0.0, 3, 0, 1, 2, 7]))
  found = by_confidence(tokens, traced, bins=2)
  assert found["layer"].tolist() == ["a", "a"] and found["tokens"].tolist() == [3, 2]
  assert found["least"].tolist() == [0.3, 0.6] and found["most"].tolist() == [0.5, 0.9]
  assert found["regret"].tolist() == [pytest.approx(5 / 3), 0.5]
  assert found["chosen_best"].tolist() == [pytest.approx(2 / 3), 1]
  # Records 0 and 1 have (3, 1) and (2, 2): a ratio's t-interval.
  assert (found["low"][0], found["high"][0]) == pytest.approx(interval([(3, 1), (2, 2)]))
  found = by_confidence(tokens, traced, "target", 2)
  assert found["layer"].tolist() == ["a", "a", "b"] and found["tokens"].tolist() == [2, 2, 1]
  assert found["least"].tolist() == pytest.approx([1 / 8, 1 / 2, 1 / 4])
  assert found["regret"].tolist() == [2, 1, 7] and np.isnan(found["low"]).tolist() == [True, True, True]
  with pytest.raises(UserError, match="of='rooter' is no confidence; did you mean 'router'?"):
    by_confidence(tokens, traced, "rooter")
  with pytest.raises(ValueError, match="not in the trace"):
    by_confidence(tokens | {"position": tokens["position"] + 5}, traced)


def test_of_equal_experts_the_chosen_one_is_the_best():
  """As in the last layer of an image, where patches do nothing any more."""
  nothing = np.zeros(3, int)
  table = dict(step=nothing, layer=np.full(3, "a"), example=nothing, position=nothing, chosen=nothing + 1,
               forced=np.arange(3), change=np.zeros(3))
  found = token_regret(table)
  assert (found["best"].item(), found["regret"].item()) == (1, 0)


def test_the_best_expert_is_found_where_it_is_known():
  """One layer of 4 experts that add the target's own direction times a size; the router always takes 0.

  All targets are alike, attention adds nothing and hidden units are positive: only a positive size helps.
  """
  size = [-1.0, -0.5, 2.0, -3.0]
  run = tiny_run(model__num_layers=1, model__moe_every=1, model__num_experts=4, model__activation="relu")
  batch = probe(run, 2, tiny_dataset(run))
  batch["targets"] = np.full_like(batch["targets"], 77)
  params = jax.tree.map(lambda x: x, run.params)
  block = params["decoder"]["blocks"]["0"]["0"]
  block["attention"]["out"] = 0 * block["attention"]["out"]
  ffn = block["ffn"]
  ffn["router"]["w"] = 0 * ffn["router"]["w"]  # all probabilities alike: ties go to expert 0
  direction = params["embedding"]["table"][77]
  w_out = ffn["experts"]["w_out"]
  ffn["experts"]["w_out"] = np.asarray(size, np.float32)[None, :, None, None] * np.broadcast_to(
      np.asarray(direction), w_out.shape)
  table = regret(dataclasses.replace(run, params=params), batch, positions=range(0, 32, 5))
  found = token_regret(table)
  assert len(found["best"]) == 14 and (found["chosen"] == 0).all()
  assert (found["best"] == 2).all() and (found["regret"] > 1).all()
  np.testing.assert_allclose(table["change"], table["own_change"], atol=1e-3)  # nothing passes it on


@pytest.mark.slow
def test_an_encoder_layer_changes_the_sequence_and_has_no_loss_of_its_own():
  run = tiny_run(**SEQ2SEQ)
  batch = probe(run, 2, tiny_dataset(run))
  table = regret(run, batch, layers=["encoder/01"], positions=[4])
  assert len(table["forced"]) == 2 * 4 and np.isnan(table["own_change"]).all()
  assert (table["change"] != 0).sum() == 6
  for arguments, message in (
      (dict(layers=["encoder/00"]), "layer 'encoder/00' is not sparse; did you mean 'encoder/01'?"),
      (dict(rank=1), "rank=1 of layer encoder/01: its tokens have k=1 choices; choose from 0 to 0"),
      (dict(positions=[40]), "positions=[40]: rows have places 0 to 31; choose among them"),
      (dict(positions=[]), "positions=[]: rows have places 0 to 31; choose among them")):
    with pytest.raises(UserError) as found:
      regret(run, batch, **arguments)
    assert message in str(found.value)


def test_a_layer_that_sees_others_is_refused():
  run = bare_run(**SEQ2SEQ, model__router__order="batch_priority", model__decoder__router__order="choice")
  with pytest.raises(UserError, match="layer encoder/01: router TopKRouter depends on other tokens"):
    regret(run, probe(run, 2, tiny_dataset(run)))
