"""Soft MoE and SMEAR in models: from a config line, counted by hand, refused where they cannot be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.analysis.probe import sparse_layers
from sparse_experts.errors import UserError
from sparse_experts.models import build, describe
from sparse_experts.moe import LAYERS
from sparse_experts.validation import validate
from tests.models.tiny import VOCAB, init, jit, make_batch, tiny

D, F, E, V = 16, 24, 4, VOCAB


def config_of(name, **arguments):
  """In the encoder; the decoder is dense."""
  config = tiny("seq2seq", num_layers=1, moe_every=1, decoder=dict(num_experts=0))
  with config.unlocked():
    config.model.router.update(dict(name=name, **arguments))
  config.data.update(dict(objective="span_corruption", length=12, target_length=6))
  config.train.batch_size = 4
  return config


@functools.cache
def case(name):
  model = build(config_of(name), V)
  params, buffers = init(model)
  return model, params, buffers, jit(model.apply)


@pytest.mark.parametrize("name", LAYERS)
def test_a_model_from_a_config_line(name):
  """Every parameter has a gradient; padding changes nothing; each row is by itself."""
  validate(config_of(name))
  model, params, buffers, apply = case(name)
  batch = make_batch()
  logits, routings = apply(params, buffers, batch)
  (layer,) = model.sparse_layers.values()
  assert layer.loss_weights == {} and layer.router is None and list(routings) == ["encoder/00"]

  def loss(params):
    return jnp.sin(model.apply(params, buffers, batch)[0]).sum()

  grads = jit(jax.grad(loss))(params)["encoder"]["blocks"]["0"]["0"]["ffn"]
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  poisoned = {**batch, "encoder_inputs": np.where(batch["encoder_segments"] > 0, batch["encoder_inputs"], 2)}
  real = batch["segments"] > 0
  np.testing.assert_allclose(apply(params, buffers, poisoned)[0][real], logits[real], rtol=1e-5, atol=1e-6)
  ids = batch["encoder_inputs"].copy()
  ids[0, 0] = 7
  other, _ = apply(params, buffers, {**batch, "encoder_inputs": ids})
  np.testing.assert_array_equal(other[1], logits[1])


def test_flops_and_parameters_by_hand():
  """Soft MoE: E slots a row, logits, two mixtures. SMEAR: an FFN a token; merging and logits once a row."""
  one, tokens = 3 * D * F, 12 / 18  # the encoder's share of tokens
  soft, smear = (describe(config_of(name), V) for name in ("soft_moe", "smear"))
  dense = 2 * one * 6 / 18
  assert soft["flops"]["ffn"] == pytest.approx(dense + tokens * 2 * one * E / 12)
  assert soft["flops"]["router"] == pytest.approx(tokens * 3 * 2 * D * E)
  assert smear["flops"]["ffn"] == pytest.approx(dense + tokens * 2 * one * (1 + E / 12))
  assert smear["flops"]["router"] == pytest.approx(tokens * 2 * D * E / 12)
  for found in (soft, smear):
    assert found["params_total"] == found["params_active"]
    assert found["executed_flops"]["ffn"] == found["flops"]["ffn"]
  assert soft["params_total"] - smear["params_total"] == (D * E + 1) - (D * E + D + E)


@pytest.mark.parametrize("name", LAYERS)
def test_groups_of_tokens_do_not_matter(name):
  """Rows are mixed, whatever `group_size`: its default, for one."""
  config = config_of(name)
  config.model.group_size = 512
  validate(config)
  config.model.router = tiny().model.router
  with pytest.raises(UserError, match="model.group_size=512 does not divide"):
    validate(config)


@pytest.mark.parametrize("name", LAYERS)
def test_sequences_of_a_row_are_mixed_as_declared(name):
  """Causality 'batch': a token of a row's first sequence changes what the second one's decoder says."""
  model, params, buffers, apply = case(name)
  assert model.sparse_layers["encoder/00"].causality == "batch"
  batch = make_batch()
  ids = batch["encoder_inputs"].copy()
  ids[0, 0] = (ids[0, 0] + 1) % V
  before, after = (apply(params, buffers, b)[0] for b in (batch, {**batch, "encoder_inputs": ids}))
  assert batch["encoder_segments"][0, 0] == 1
  assert np.abs(after - before)[0][batch["segments"][0] == 2].max() > 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_a_causal_decoder_refuses_it_by_name(name):
  config = tiny()
  config.model.router.name = name
  with pytest.raises(UserError, match=f"model.router.name='{name}' sees other tokens, later ones too"):
    build(config, V)


def test_what_needs_a_list_says_so():
  with pytest.raises(UserError, match="layer encoder/00 assigns no token to an expert: it mixes all of them"):
    sparse_layers(case("soft_moe")[0])
  with pytest.raises(UserError, match="router.slot is set, but router.name='soft_moe' takes no such"):
    build(config_of("soft_moe", slot=2), V)
