"""A decoder whose layers have a relative bias each, as GLaM's, against the whole forward pass in numpy."""

import jax
import numpy as np

from sparse_experts.models import build
from tests.models.tiny import VOCAB, init, jit, make_batch, one_segment, tiny

ROUNDING = dict(rtol=1e-4, atol=1e-5)  # float32 sums of tens of terms, through two layers


def numpy_logits(params, ids_L):
  """Pre-norm layers; scores q k + table[distance], unscaled and causal: up to 15 a distance is its bucket."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  rms = lambda x, norm: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * norm["scale"]
  L = len(ids_L)
  distance_LM = np.arange(L)[:, None] - np.arange(L)[None]
  x_LD = p["embedding"]["table"][ids_L]
  stacked = p["decoder"]["blocks"]["0"]["0"]
  for layer in range(2):
    b = jax.tree.map(lambda a, layer=layer: a[layer], stacked)
    a, h_LD = b["attention"], rms(x_LD, b["attention_norm"])
    q, k, v = (np.einsum("ld,dhp->lhp", h_LD, a[name]) for name in ("query", "key", "value"))
    table_NH = b["position_bias"]["table"]
    score = np.einsum("lhp,mhp->hlm", q, k) + np.moveaxis(table_NH[np.maximum(distance_LM, 0)], -1, 0)
    weight = np.exp(score) * (distance_LM >= 0)
    x_LD = x_LD + np.einsum("hlm,mhp,hpd->ld", weight / weight.sum(-1, keepdims=True), v, a["out"])
    h_LD, f = rms(x_LD, b["ffn_norm"]), b["ffn"]
    gate = h_LD @ f["w_gate"]
    x_LD = x_LD + (gate / (1 + np.exp(-gate)) * (h_LD @ f["w_in"])) @ f["w_out"]
  return rms(x_LD, p["decoder"]["norm"]) @ p["head"]["w"]


def test_forward_pass_and_cached_decoding():
  model = build(tiny(num_layers=2, num_experts=0, layer_bias=True), VOCAB, "dropless")
  params, buffers = init(model)
  table = params["decoder"]["blocks"]["0"]["0"]["position_bias"]["table"]
  assert table.shape == (2, 32, 2)  # of two layers, for two heads
  batch = one_segment(make_batch(rows=1, length=12))
  expected = numpy_logits(params, batch["decoder_inputs"][0])
  np.testing.assert_allclose(jit(model.apply)(params, buffers, batch)[0][0], expected, **ROUNDING)

  decode, cache = jit(model.decode), model.init_cache(1, length=12)
  for step in range(3):
    ids = batch["decoder_inputs"][:, 4 * step:4 * step + 4]
    logits, cache = decode(params, buffers, cache, ids)
    np.testing.assert_allclose(logits[0], expected[4 * step:4 * step + 4], **ROUNDING)
