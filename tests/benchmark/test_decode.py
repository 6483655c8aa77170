"""Tokens that are timed are those that `sample` would draw, and weights that are read are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.benchmark import decode
from sparse_experts.errors import UserError
from sparse_experts.models import build, counts
from tests.training.test_measures import undefined
from tests.training.tiny import tiny_config

V = 260


@pytest.fixture(scope="module")
def model():
  model = build(tiny_config(), V, "dropless")
  return model, *jax.jit(model.init)(jax.random.key(0))


def test_tokens_are_the_likeliest_of_the_whole_text(model):
  """Decoded one by one with a cache, or read off a model that sees all of them at once."""
  program = decode.decode_program(*model, 2, 4, 5)
  last_B1 = np.asarray(program())
  text_BL = np.asarray(jax.random.randint(jax.random.key(1), (2, 4), 3, 200))
  spec, params, buffers = model
  apply = jax.jit(lambda ids: spec.apply(params, buffers, {
      "decoder_inputs": ids, "segments": jnp.ones_like(ids),
      "positions": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)})[0])
  for _ in range(6):  # the token after the prompt, and 5 more
    whole_BL = np.zeros((2, 9 + 1), np.int32)
    whole_BL[:, : text_BL.shape[1]] = text_BL
    logits_BLV = apply(jnp.asarray(whole_BL))
    new_B = np.argmax(logits_BLV[:, text_BL.shape[1] - 1], axis=-1)
    text_BL = np.concatenate([text_BL, new_B[:, None]], axis=1)
  np.testing.assert_array_equal(last_B1[:, 0], text_BL[:, -1])


def test_weights_that_a_step_reads(model):
  """One token reads its own expert of 8; many tokens all of them."""
  spec, params, _ = model
  total = sum(a.nbytes for a in jax.tree.leaves(params))
  experts = 4 * 8 * 3 * 16 * 32  # one sparse layer
  assert decode.weight_bytes(spec, params, 1) == total - experts * 7 / 8
  assert decode.weight_bytes(spec, params, 2) == pytest.approx(total - experts * (7 / 8) ** 2)
  assert decode.weight_bytes(spec, params, 1000) == pytest.approx(total)


def test_what_is_compared():
  """The twin costs the same FLOPs, the other dense one has the same parameters."""
  found = {name: counts.describe(c, V) for name, c in decode.configs(tiny_config(), V).items()}
  assert list(found) == ["sparse", "dense_twin", "matched_dense"]
  assert found["matched_dense"]["params_total"] == pytest.approx(found["sparse"]["params_total"], rel=0.02)
  assert found["dense_twin"]["params_total"] < 0.7 * found["sparse"]["params_total"]
  with pytest.raises(UserError, match="benchmark decode needs a decoder"):
    decode.configs(tiny_config(model__name="seq2seq", data__objective="span_corruption"), V)


@pytest.mark.slow
def test_rows_by_batch_size():
  rows = []
  found = decode.measure(tiny_config(), V, 2, batches=(2,), prompt=4, length=3, say=rows.append)
  assert rows == found["rows"] and [row["batch"] for row in rows] == [2]
  for row in rows:
    for m in row["models"].values():
      assert m["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / m["ms_per_token"])
      assert not undefined(m)
  assert not undefined({"params_total"})
