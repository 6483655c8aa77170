import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import moe, partitioning
from sparse_experts.models import build
from sparse_experts.models.text import Embedding
from tests.models.tiny import VOCAB, init, jit, make_batch, one_segment, tiny

NAMES = ("decoder", "seq2seq")
ROUNDING = dict(rtol=1e-4, atol=1e-5)  # float32 sums in another order, through four layers


class Case:
  """A dropless model with sparse layers, compiled once for all tests that call `logits`."""

  def __init__(self, name, **model):
    self.model = build(tiny(name, **model), VOCAB, "dropless")
    self.params, self.buffers = init(self.model)
    self.batch = make_batch()
    self.apply = jit(self.model.apply)

  def logits(self, batch=None, params=None):
    return np.asarray(self.apply(params or self.params, self.buffers, batch or self.batch)[0])


ATTENTIONS = {  # decoders whose attention is another
    "grouped": dict(num_heads=4, attention=dict(num_kv_heads=2, qk_norm="head", bias=True)),
    "latent": dict(head_dim=10, attention=dict(name="latent", q_rank=6, kv_rank=5, rope_dim=4, value_dim=8)),
}


@functools.cache
def case(name):
  return Case("decoder", **ATTENTIONS[name]) if name in ATTENTIONS else Case(name)


def changed(batch, name, row, at, by=1):
  return {**batch, name: np.where(
      (np.arange(len(batch[name]))[:, None] == row) & (np.arange(batch[name].shape[1]) == at),
      (batch[name] + by) % VOCAB, batch[name])}


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_other_segments_and_other_rows_change_nothing(name):
  c = case(name)
  base, segments = c.logits(), c.batch["segments"]
  after = c.logits(changed(c.batch, "decoder_inputs", row=0, at=4))
  moved = np.abs(after - base).max(-1) > 1e-4
  here = np.zeros_like(moved)
  here[0, 4:] = segments[0, 4:] == segments[0, 4]
  np.testing.assert_array_equal(moved, here)


def test_a_decoder_segment_reads_its_own_encoder_segment():
  c = case("seq2seq")
  moved = np.abs(c.logits(changed(c.batch, "encoder_inputs", row=1, at=6)) - c.logits()).max(-1) > 1e-5
  assert c.batch["encoder_segments"][1, 6] == 2
  real = c.batch["segments"] > 0
  np.testing.assert_array_equal(moved & real, (c.batch["segments"] == 2) & (np.arange(2) == 1)[:, None])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaks_from_padding(name):
  """Padding holds a token whose embedding is NaN: real logits and all gradients stay as they were."""
  c = case(name)
  poisoned = dict(c.batch)
  for ids, segments in (("decoder_inputs", "segments"), ("encoder_inputs", "encoder_segments")):
    poisoned[ids] = np.where(c.batch[segments] > 0, c.batch[ids], 2)
  table = c.params["embedding"]["table"].at[2].set(jnp.nan)
  params = {**c.params, "embedding": {"table": table}}
  real = c.batch["segments"] > 0
  np.testing.assert_allclose(c.logits(poisoned, params)[real], c.logits()[real], **ROUNDING)

  def loss(params):
    logits_BLV, routings = c.model.apply(params, c.buffers, poisoned)
    auxiliary = [r.losses for r in routings.values()]
    return jnp.where(real[..., None], jnp.sin(logits_BLV), 0.0).sum() + sum(
        jnp.sum(a) for a in jax.tree.leaves(auxiliary))

  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jit(jax.grad(loss))(params)))


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(a, marks=pytest.mark.slow) for a in ATTENTIONS)])
def test_cached_decoding_equals_teacher_forcing(name):
  """A prompt in one pass, then token by token; one row's prompt is shorter and padded on the left."""
  c = case(name)
  batch = one_segment(c.batch)
  batch["encoder_segments"][1, -3:] = 0
  expected = c.logits(batch)
  ids = batch["decoder_inputs"]
  extra = {"encoded": jit(c.model.encode)(c.params, c.buffers, batch)} if name == "seq2seq" else {}
  decode = jit(c.model.decode)

  cache = c.model.init_cache(2, length=20)
  short = 3  # row 1 starts with 5 - 3 tokens of padding
  prompt = np.stack([ids[0, :5], np.concatenate([[2, 2], ids[1, :short]])])
  mask = np.asarray([[True] * 5, [False] * 2 + [True] * short])
  logits, cache = decode(c.params, c.buffers, cache, prompt, mask, **extra)
  np.testing.assert_allclose(logits[0], expected[0, :5], **ROUNDING)
  np.testing.assert_allclose(logits[1, 2:], expected[1, :short], **ROUNDING)
  for step in range(6):
    now = np.stack([ids[0, 5 + step], ids[1, short + step]])[:, None]
    logits, cache = decode(c.params, c.buffers, cache, now, **extra)
    np.testing.assert_allclose(logits[0, 0], expected[0, 5 + step], **ROUNDING)
    np.testing.assert_allclose(logits[1, 0], expected[1, short + step], **ROUNDING)
  assert cache["index"] == 11 and cache["position"].tolist() == [11, 9]


def test_a_tied_head_scales_by_the_root_of_the_width():
  embedding = Embedding(VOCAB, 16, key=jax.random.key(0))
  x_BLD = jax.random.normal(jax.random.key(1), (1, 3, 16))
  expected = x_BLD[0] @ embedding.table[...].T / 4
  np.testing.assert_allclose(embedding.logits(x_BLD)[0], expected, rtol=1e-5, atol=1e-5)


def test_decoding_refuses_what_it_could_not_do_right():
  with pytest.raises(ValueError, match="dropless"):
    build(tiny(capacity_factor=1.0), VOCAB).init_cache(2, 8)


def test_bfloat16_activations_leave_parameters_router_and_logits_in_float32():
  c = Case("decoder", dtype="bfloat16", tied_head=True)
  assert {a.dtype for a in jax.tree.leaves(c.params)} == {jnp.dtype("float32")}
  logits, routings = jit(functools.partial(c.model.apply, trace=True))(c.params, c.buffers, c.batch)
  assert logits.dtype == jnp.float32 and routings["decoder/01"].gate.dtype == jnp.float32
  reference = Case("decoder", tied_head=True).logits()
  real = c.batch["segments"] > 0
  # bfloat16 keeps 8 bits: a few parts in a hundred after four layers, and not less than float32 would.
  error = np.abs(logits - reference)[real].mean() / np.abs(reference[real]).mean()
  assert 1e-4 < error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shape, fsdp", [("decoder", (2, 4, 1), False), ("seq2seq", (1, 2, 2), True)],
    ids=["decoder-2x4", "seq2seq-model=2-fsdp"])
def test_a_mesh_changes_no_number(name, shape, fsdp):
  """Logits and gradients, with dropout, under capacity; vocabulary, heads and hidden width over `model`.

  Activations cross `expert` by two all-to-alls forward and two backward in each scanned sparse layer,
  and no vector is gathered.
  """
  config = tiny(name, num_layers=2, capacity_factor=1.0, min_capacity=1, dropout=0.1, expert_dropout=0.2,
                tied_head=True)
  model, batch = build(config, VOCAB), make_batch(rows=8)
  params, buffers = init(model)

  def loss(params, batch):
    logits_BLV, routings = model.apply(params, buffers, batch, jax.random.key(1))
    total = jnp.mean(jnp.sin(logits_BLV)) + sum(s for r in routings.values() for s, _ in r.losses.values())
    return total, (logits_BLV, {n: r.metrics for n, r in routings.items()})

  f = jax.value_and_grad(loss, has_aux=True)
  expected = jit(f)(params, batch)
  mesh = partitioning.make_mesh(*shape)
  with partitioning.use(mesh):
    sharded = jax.device_put(params, partitioning.shardings(model.axes, mesh, fsdp))
    rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
    compiled = jit(f).lower(sharded, rows).compile()
  actual, text = compiled(sharded, rows), compiled.as_text()
  assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 4 * len(model.sparse_layers)
  if not fsdp:
    assert not re.search(r"= \(?(?:f32|bf16)\S* all-gather(?:-start)?\(", text)
  assert sum(float(m["dropped"][0]) for m in actual[0][1][1].values()) > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_edits_reach_the_layer_they_name(name):
  """One token forced in one layer: that assignment changes, earlier layers do not, later tokens may."""
  model = build(tiny(name), VOCAB, "dropless", edit=moe.force)
  params, buffers = init(model)
  batch = make_batch()
  widths = {layer: batch[f"{layer.partition('/')[0]}_inputs"].shape for layer in model.sparse_layers}
  apply = jit(functools.partial(model.apply, trace=True))
  edits = {layer: np.full(shape, -1, np.int32) for layer, shape in widths.items()}
  _, before = apply(params, buffers, batch, edits=edits)
  for layer, (_, length) in widths.items():
    chosen = np.asarray(before[layer].expert).reshape(-1)[length + 3]  # row 1, place 3
    wanted = edits[layer].copy()
    wanted[1, 3] = (chosen + 1) % 4
    _, after = apply(params, buffers, batch, edits={**edits, layer: wanted})
    moved = {n: np.flatnonzero(np.asarray(after[n].expert) != np.asarray(before[n].expert)) for n in widths}
    assert moved[layer].tolist() == [length + 3]
    assert not any(len(moved[n]) for n in list(widths)[:list(widths).index(layer)])
