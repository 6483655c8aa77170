"""A trace is what the model's routings say, row by row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest

from sparse_experts import partitioning
from sparse_experts.analysis.probe import fingerprint, probe
from sparse_experts.analysis.trace import TOP, trace
from sparse_experts.errors import UserError
from sparse_experts.moe import Router, Routing
from sparse_experts.training.evaluate import Evaluator
from tests.analysis.tiny_run import DECODER, HEADS, SEQ2SEQ, bare_run, tiny_dataset, tiny_run

CASES = {"dropless": (DECODER, "dropless"), "eval_capacity": (DECODER, "eval_capacity"),
         "seq2seq": (SEQ2SEQ, "train"), "heads": (HEADS, "eval_capacity")}


@functools.cache
def case(name, mesh=(1, 1, 1)):
  """(run, probe, trace of it): 11 records in parts of 8 rows, so the last part is filled up."""
  keys, kind = CASES[name]
  run = tiny_run(mesh, **keys)
  batch = probe(run, 11, tiny_dataset(run))
  return run, batch, trace(run, batch, kind)


def by_hand(run, batch, kind):
  """{(layer, example, position, head, rank): row} in plain Python, from the model's own routings."""
  batch = {name: np.pad(a, ((0, 1),) + ((0, 0),) * (a.ndim - 1)) for name, a in batch.items()}  # whole groups
  logits, routings = run.model(batch, trace=True, kind=kind)
  log_prob = np.asarray(jax.nn.log_softmax(logits))
  rows, dropped = {}, {}
  for layer, r in jax.device_get(routings).items():
    encoder = layer.startswith("encoder")
    ids = batch["encoder_inputs" if encoder else "decoder_inputs"]
    segments = batch["encoder_segments" if encoder else "segments"]
    dropped[layer] = r.metrics["dropped"]
    seen = {}
    for g in range(r.token.shape[0]):
      for a in range(r.token.shape[1]):
        token, head = divmod(g * r.prob.shape[1] + int(r.token[g, a]), run.config.model.moe_heads)
        example, position = divmod(token, ids.shape[1])
        if not segments[example, position]:
          continue
        rank = seen[token, head] = seen.get((token, head), -1) + 1
        prob = r.prob[g, r.token[g, a]]
        order = np.argsort(-prob, kind="stable")[:TOP]
        loss = np.nan
        if not encoder and batch["weights"][example, position]:
          loss = -log_prob[example, position, batch["targets"][example, position]]
        rows[layer, example, position, head, rank] = dict(
            token_id=ids[example, position], domain=batch["domain"][example], expert=r.expert[g, a],
            gate=r.gate[g, a], valid=r.valid[g, a], kept=r.kept[g, a], token_loss=loss,
            entropy=-sum(p * np.log(p) for p in prob if p > 0),
            **{f"prob_{i}": prob[order[i]] if i < len(order) else np.nan for i in range(TOP)},
            **{f"prob_expert_{i}": order[i] if i < len(order) else -1 for i in range(TOP)})
  return rows, dropped


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_that_of_a_loop_over_the_routings(name):
  """Tolerance: the same float32 sums in another program."""
  run, batch, found = case(name)
  expected, dropped = by_hand(run, batch, CASES[name][1])
  keys = list(zip(*(found[c].tolist() for c in ("layer", "example", "position", "head", "rank"))))
  assert keys == sorted(expected), "each assignment of real tokens once, in order"
  for column in next(iter(expected.values())):
    wanted = np.array([expected[key][column] for key in keys])
    np.testing.assert_allclose(found[column], wanted, rtol=1e-4, atol=1e-5, err_msg=column)
  for layer, (lost, wanted) in dropped.items():
    of_layer = found["layer"] == layer
    assert (found["valid"] & ~found["kept"])[of_layer].sum() == lost
    assert found["valid"][of_layer].sum() == wanted
  assert (name == "dropless") == (sum(lost for lost, _ in dropped.values()) == 0)


def test_layers_with_other_experts_and_rows_of_other_length():
  _, batch, found = case("seq2seq")
  encoder = np.char.startswith(found["layer"], "encoder")
  assert found["position"][encoder].max() == 31
  assert found["position"][~encoder].max() == batch["segments"].sum(1).max() - 1
  assert set(found["expert"][encoder]) == set(range(4)) and set(found["expert"][~encoder]) == set(range(8))
  assert np.isnan(found["prob_4"][encoder]).all() and (found["prob_expert_4"][encoder] == -1).all()
  assert np.isnan(found["token_loss"][encoder]).all() and np.isfinite(found["token_loss"][~encoder]).all()
  assert (batch["segments"] == 0).any(), "there was padding to leave out"


@pytest.mark.slow
def test_a_mesh_changes_nothing():
  """With capacity, in both stacks."""
  found, expected = case("seq2seq", (2, 4, 1))[2], case("seq2seq")[2]
  assert not expected["kept"].all()
  for column in expected:
    if expected[column].dtype.kind == "f":  # sums in another order
      np.testing.assert_allclose(found[column], expected[column], rtol=2e-4, atol=1e-4, err_msg=column)
    else:
      np.testing.assert_array_equal(found[column], expected[column], err_msg=column)


def test_token_losses_add_up_to_the_evaluators():
  run, batch, found = case("dropless")
  numbers = Evaluator(run.abstract_model("dropless"), run.config, run.mesh, tiny_dataset(run))(
      run.params, run.buffers, 11)
  each = (found["layer"] == "decoder/00") & (found["rank"] == 0)
  assert each.sum() == (batch["weights"] > 0).sum()
  np.testing.assert_allclose(found["token_loss"][each].mean(), numbers["loss"], rtol=1e-5)


def test_one_line_to_a_frame(tmp_path):
  found = case("dropless")[2]
  np.savez(tmp_path / "x.npz", **found)
  frame = pandas.DataFrame(dict(np.load(tmp_path / "x.npz")))
  assert list(frame.columns) == list(found) and len(frame) == len(found["step"])
  assert frame.groupby("layer").expert.nunique().to_dict() == {"decoder/00": 8, "decoder/01": 8}


def test_steps_of_a_run_on_the_same_probe():
  run, batch, expected = case("dropless")
  later = dataclasses.replace(run, step=5, params=jax.tree.map(lambda x: -x, run.params))
  found = trace((r for r in (run, later)), batch)
  first = found["step"] == 0
  assert set(found["step"]) == {0, 5} and first.sum() * 2 == len(first)
  np.testing.assert_array_equal(found["expert"][first], expected["expert"])
  assert (found["expert"][~first] != expected["expert"]).any()


class Modulo(Router):
  """Token id modulo E, and no probabilities."""

  causality, drop_causality = "self", "past"

  def __init__(self, num_experts):
    self.num_experts = num_experts

  def __call__(self, x_GTD, tokens, capacity, key=None):
    place_GT = jnp.broadcast_to(jnp.arange(x_GTD.shape[1], dtype=jnp.int32), x_GTD.shape[:2])
    load_E, real = jnp.zeros(self.num_experts), tokens.mask.sum(dtype=jnp.float32)
    return Routing(token=place_GT, expert=tokens.id % self.num_experts, gate=jnp.ones(x_GTD.shape[:2]),
                   valid=tokens.mask, metrics={"load": (load_E, real)})


def test_a_router_without_probabilities():
  run = tiny_run(router=Modulo(8))
  found = trace(run, probe(run, 3, tiny_dataset(run)))
  np.testing.assert_array_equal(found["expert"], found["token_id"] % 8)
  assert np.isnan(found["prob_0"]).all() and np.isnan(found["entropy"]).all()
  assert (found["prob_expert_0"] == -1).all()


def test_a_probe_is_the_first_records_whatever_the_batch_size():
  run, batch, _ = case("dropless")
  dataset = tiny_dataset(run)
  np.testing.assert_array_equal(batch["targets"][10], dataset[10]["targets"])
  again = probe(bare_run(eval__batch_size=3, train__seed=9), 11, dataset)
  assert fingerprint(again) == fingerprint(batch) != fingerprint(probe(run, 10, dataset))
  assert len(probe(run, 10**6, dataset)["targets"]) == len(dataset)
  with pytest.raises(UserError, match="a probe of 0 records"):
    probe(run, 0, dataset)


def test_a_dense_model_has_nothing_to_trace():
  run = bare_run(model__num_experts=0)
  with pytest.raises(UserError, match="no sparse layer"):
    trace(run, probe(run, 3, tiny_dataset(run)))


def test_the_mesh_is_asked_for_whole_groups():
  run = bare_run((2, 4, 1), **DECODER)
  assert run.abstract_model("eval_capacity").row_quantum({"decoder_inputs": np.zeros((1, 32))}, 8) == 16
  assert partitioning.current_mesh() is None
