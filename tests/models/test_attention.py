import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.models.attention import Attention, RelativeBias, relative_bucket
from sparse_experts.models.rope import Rope

# key position - query position -> bucket in the encoder, in the decoder, of T5's mesh and HF code.
T5_BUCKETS = {
    0: (0, 0), -1: (1, 1), 1: (17, 0), -7: (7, 7), -8: (8, 8), -11: (8, 11), -12: (9, 12), -16: (10, 16),
    8: (24, 0), 16: (26, 0), -32: (12, 21), -64: (14, 26), -127: (15, 31), 1000: (31, 0), -1000: (15, 31),
}


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_are_those_of_t5(bidirectional):
  buckets = relative_bucket(jnp.asarray(list(T5_BUCKETS)), bidirectional)
  assert buckets.tolist() == [b[0 if bidirectional else 1] for b in T5_BUCKETS.values()]


def loops_bucket(offset, bidirectional, num_buckets, max_distance):
  """The formula with exact whole-number comparisons in place of logarithms."""
  if bidirectional:
    num_buckets //= 2
  first = num_buckets if bidirectional and offset > 0 else 0
  n, exact = abs(offset) if bidirectional else max(-offset, 0), num_buckets // 2
  if n < exact:
    return first + n
  wide = num_buckets - exact
  far = 0  # the largest whole number with (n / exact) >= (max_distance / exact)^(far / wide)
  while far < wide - 1 and n**wide * exact**(far + 1) >= exact**wide * max_distance**(far + 1):
    far += 1
  return first + exact + far


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (12, 27), (64, 256), (7, 9)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_of_another_number_and_distance(bidirectional, num_buckets, max_distance):
  offset_N = np.arange(-300, 301)
  buckets = relative_bucket(jnp.asarray(offset_N), bidirectional, num_buckets, max_distance)
  assert buckets.tolist() == [
      loops_bucket(int(n), bidirectional, num_buckets, max_distance) for n in offset_N]


def test_relative_bias_reads_the_table_by_distance():
  bias = RelativeBias(3, bidirectional=True, d=4, key=jax.random.key(0))
  bias_HLM = bias(jnp.arange(4, 7), jnp.arange(10))
  assert bias_HLM.shape == (3, 3, 10)
  np.testing.assert_array_equal(bias_HLM[:, 1, 6], bias.table[...][17])  # query 5, key 6: offset +1
  np.testing.assert_array_equal(bias_HLM[:, 2, 4], bias.table[...][2])


def test_rotation_leaves_only_the_distance_in_the_product():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def score(query_position, key_position):
    at = lambda x, p: Rope().rotate(x, jnp.full((1, 1), p))
    return (at(q, query_position) * at(k, key_position)).sum()

  np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-5)  # float32 angles of about 100
  assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_rotation_by_hand():
  x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
  angles = 5.0, 5.0 * 1e4**-0.5
  a, b = [(x0 * np.cos(t) - x1 * np.sin(t), x1 * np.cos(t) + x0 * np.sin(t))
          for (x0, x1), t in zip(((1, 3), (2, 4)), angles)]
  np.testing.assert_allclose(
      Rope().rotate(x, jnp.full((1, 1), 5)).ravel(), [a[0], b[0], a[1], b[1]], rtol=1e-6)


@pytest.mark.parametrize("rope", [True, False])
def test_attention_by_hand(rope):
  """One query, two visible keys out of three: scaled with rotation, unscaled and biased without."""
  layer = Attention(4, 2, 6, rope=Rope() if rope else None, key=jax.random.key(0))
  x_BLD = jax.random.normal(jax.random.key(1), (1, 3, 4))
  mask_BLM = jnp.asarray([[[True, True, True], [True, True, False], [True, True, True]]])
  position_BL, bias_HLM = jnp.asarray([[0, 1, 2]]), jax.random.normal(jax.random.key(2), (2, 3, 3))
  y_BLD = layer(layer.queries(x_BLD, position_BL), layer.keys_values(x_BLD, position_BL), mask_BLM,
                bias_HLM=None if rope else bias_HLM)

  weight = lambda w: jnp.einsum("ld,dhp->lhp", x_BLD[0], w[...])
  q, k, v = weight(layer.query), weight(layer.key), weight(layer.value)
  if rope:
    q, k = Rope().rotate(q[None], position_BL)[0], Rope().rotate(k[None], position_BL)[0]
  expected = 0
  for h in range(2):
    score = np.asarray([q[1, h] @ k[m, h] for m in range(2)])
    score = score * 6**-0.5 if rope else score + bias_HLM[h, 1, :2]
    p = np.exp(score) / np.exp(score).sum()
    expected += (p[0] * v[0, h] + p[1] * v[1, h]) @ layer.out[...][h]
  np.testing.assert_allclose(y_BLD[0, 1], expected, rtol=1e-5, atol=1e-6)


def test_grouped_heads_normed_and_biased_by_hand():
  """Queries 0 and 1 read keys 0, queries 2 and 3 keys 1; bias, then norm over all heads, then rotation."""
  layer = Attention(4, 4, 6, rope=Rope(), num_kv_heads=2, qk_norm="whole", bias=True, norm_eps=0.1,
                    key=jax.random.key(0))
  for i, name in enumerate(("query_bias", "key_bias", "value_bias", "query_norm", "key_norm")):
    parameter = getattr(layer, name)
    parameter[...] = jax.random.normal(jax.random.key(3 + i), parameter.shape)
  x_BLD, position_BL = jax.random.normal(jax.random.key(1), (1, 3, 4)), jnp.asarray([[0, 1, 2]])
  y_BLD = layer(layer.queries(x_BLD, position_BL), layer.keys_values(x_BLD, position_BL),
                jnp.ones((1, 3, 3), bool))

  weight = lambda w, b: jnp.einsum("ld,dhp->lhp", x_BLD[0], w[...]) + b[...][None]
  norm = lambda a, g: a * g[...][None] / np.sqrt((a**2).mean((1, 2), keepdims=True) + 0.1)
  turned = lambda a: Rope().rotate(a[None], position_BL)[0]
  q = turned(norm(weight(layer.query, layer.query_bias), layer.query_norm))
  k = turned(norm(weight(layer.key, layer.key_bias), layer.key_norm))
  v, expected = weight(layer.value, layer.value_bias), 0
  for h in range(4):
    p = jax.nn.softmax(q[1, h] @ k[:, h // 2].T * 6**-0.5)
    expected += p @ v[:, h // 2] @ layer.out[...][h]
  np.testing.assert_allclose(y_BLD[0, 1], expected, rtol=1e-5, atol=1e-6)


def test_each_head_can_be_normed_by_itself():
  layer = Attention(4, 2, 6, rope=None, qk_norm="head", norm_eps=0.0, key=jax.random.key(0))
  q_BLHP = layer.queries(jax.random.normal(jax.random.key(1), (1, 3, 4)))
  np.testing.assert_allclose((q_BLHP**2).mean(-1), np.ones((1, 3, 2)), rtol=1e-5)
  assert layer.query_norm.shape == (6,)


def test_yarn_leaves_fast_pairs_and_slows_slow_ones():
  """At a width of 8 pairs 0 to 3 turn by 1, .1, .01, .001 a position: 10.2, 1.02, .1, .01 times in 64."""
  plain, yarn = Rope(), Rope(factor=8.0, original_length=64, beta_fast=8.0, beta_slow=0.5)
  # Pairs that turn 8 and 0.5 times: 0.105 and 1.31, so the ramp goes from 0 to 2 and pair 1 is half way.
  assert yarn.frequencies(8).tolist() == pytest.approx([1, 0.1 * (0.5 + 0.5 / 8), 0.01 / 8, 0.001 / 8])
  assert plain.frequencies(8).tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
  assert (plain.gain, plain.score_gain) == (1, 1)
  assert yarn.gain == pytest.approx(1 + 0.1 * np.log(8)) and yarn.score_gain == 1
  deepseek = Rope(factor=40.0, mscale=1.0, mscale_all_dim=1.0)
  assert deepseek.gain == 1 and deepseek.score_gain == pytest.approx((1 + 0.1 * np.log(40)) ** 2)
