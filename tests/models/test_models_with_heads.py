"""MH-MoE in every family: what it costs, by the numbers of the papers' parity, and what it changes."""

import re

import jax
import numpy as np
import pytest

from sparse_experts.config import dense_twin
from sparse_experts.errors import UserError
from sparse_experts.models import build, describe
from sparse_experts.models.even_load import warning
from sparse_experts.validation import validate
from tests.models import test_limoe, test_vit
from tests.models.tiny import VOCAB, init, jit, make_batch, tiny

PARITY = dict(num_layers=1, moe_every=1, embed_dim=96, expert_dim=192, num_experts=8, activation="relu",
              router=dict(k=2))


def counts(**model):
  found = describe(tiny(**dict(PARITY, **model)), VOCAB)
  (layer,) = found["layers"]
  return found, layer


def test_parameters_and_flops_are_those_of_the_parity_formula():
  """Per token and layer: c k d r + d E and 2 d^2 + c k d r' + d E'; these sizes differ by gates alone."""
  d, c, k = 96, 2, 2
  plain, of_plain = counts()
  assert (plain["flops"]["ffn"] / 2, plain["flops"]["router"] / 2) == (c * k * d * 192, d * 8)
  for h, experts in ((2, 20), (3, 30)):
    found, layer = counts(moe_heads=h, expert_dim=144, num_experts=experts)
    assert found["flops"]["ffn"] == plain["flops"]["ffn"] == 2 * 73_728
    assert found["flops"]["router"] / 2 == d * experts
    # The formula leaves out the projections' biases, 2 d; gates are d E and d E' / h.
    assert layer["params"] - 2 * d - of_plain["params"] == d * experts // h - d * 8 == 192
    assert layer["heads"] == h
  twin = describe(dense_twin(tiny(**dict(PARITY, moe_heads=2, expert_dim=144, num_experts=20))), VOCAB)
  assert twin["flops"]["ffn"] == plain["flops"]["ffn"]


def test_a_token_meets_at_most_all_experts_and_slots_are_of_sub_tokens():
  found, layer = counts(moe_heads=3, num_experts=4)
  assert layer["params"] == layer["params_active"]  # 3 x 2 choices of 4 experts
  model = tiny(**dict(PARITY, moe_heads=3, num_experts=30, dispatch="einsum", capacity_factor=1.0,
                      capacity_rule="vmoe_paper"))
  found = describe(model, VOCAB)
  C = 2 * 3 * 16 // 30  # group_size 16
  executed, wanted = found["executed_flops"], found["flops"]
  projections = 2 * 2 * 96 * 96
  assert executed["ffn"] - projections == pytest.approx(
      (wanted["ffn"] - projections) * 30 * C / (2 * 3 * 16))
  assert executed["dispatch"] == 2 * 30 * C * 2 * 96
  layers = build(model, VOCAB, "train").sparse_layers
  assert layers["decoder/00"].capacity == C and "in a group of 48" in warning(layers)


@pytest.mark.parametrize("projections, names", [
    ("both", {"w_head", "b_head", "w_merge", "b_merge"}), ("merge", {"w_merge", "b_merge"}), ("none", set())])
def test_parameters_of_the_projections(projections, names):
  model = build(tiny(num_layers=2, moe_heads=2, moe_projections=projections), VOCAB)
  ffn = jax.eval_shape(model.init, jax.random.key(0))[0]["decoder"]["blocks"]["0"]["1"]["ffn"]
  assert set(ffn.get("heads", {})) == names
  assert ffn["experts"]["w_in"].shape == (1, 4, 8, 24) and ffn["router"]["w"].shape == (1, 8, 4)


@pytest.mark.parametrize("name", ["decoder", "seq2seq"])
def test_padding_and_later_tokens_change_nothing(name):
  model = build(tiny(name, num_layers=2, moe_heads=2), VOCAB, "dropless")
  params, buffers = init(model)
  batch, apply = make_batch(), jit(model.apply)
  base = np.asarray(apply(params, buffers, batch)[0])
  real = batch["segments"] > 0
  other = {**batch, "decoder_inputs": np.where(real, batch["decoder_inputs"], 2)}
  other["decoder_inputs"][0, 4] += 1
  moved = np.abs(np.asarray(apply(params, buffers, other)[0]) - base).max(-1) > 1e-5  # float32 rounding
  here = np.zeros_like(moved)
  here[0, 4:] = batch["segments"][0, 4:] == batch["segments"][0, 4]
  np.testing.assert_array_equal(moved & real, here)


@pytest.mark.parametrize("changes, message", [
    (dict(moe_heads=3), "model.moe_heads=3 does not divide model.embed_dim=16; choose 2, 4 or 8, or "),
    (dict(moe_projections="head"), "model.moe_projections='head' is set, but model.moe_heads=1 cuts"),
    (dict(moe_heads=2, moe_place="both"), "model.moe_heads=2 cuts the tokens of sparse FFNs, but "),
    (dict(name="seq2seq", moe_heads=2, router=dict(name="soft_moe")), "a layer of its own, without .*heads"),
])
def test_what_does_not_fit_is_one_line(changes, message):
  with pytest.raises(UserError, match=message) as e:
    config = tiny(**changes)
    config.data.length, config.train.batch_size = 16, 4
    if config.model.name == "seq2seq":
      config.data.objective = "span_corruption"
    validate(config)
  assert not re.search("\n", str(e.value))


@pytest.mark.parametrize("family, router", [(test_vit, "v_moe"), (test_limoe, "limoe")])
def test_images_and_pairs_are_cut_too(family, router):
  """In training, with the router's losses and capacity; nothing is computed."""
  config = family.tiny(moe_heads=2, expert_weights="ternary", router=dict(name=router, k=1))
  model = build(config, 12, "train")
  loss = lambda params, buffers: (lambda y, routings: (y.sum(), routings))(
      *model.apply(params, buffers, family.make_batch(), key=jax.random.key(0), trace=True))
  params, buffers = jax.eval_shape(model.init, jax.random.key(0))
  grads, routings = jax.eval_shape(jax.grad(loss, has_aux=True), params, buffers)
  (routing,) = routings.values()
  assert routing.token.shape[1] == 2 * config.model.group_size  # sub-tokens, k = 1
  assert jax.tree.map(lambda a: a.shape, grads) == jax.tree.map(lambda a: a.shape, params)
