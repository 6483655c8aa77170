import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.models import describe
from sparse_experts.models.latent_attention import LatentAttention
from sparse_experts.models.rope import Rope
from tests.models.tiny import VOCAB, tiny

ARGUMENTS = dict(kv_rank=5, rope_dim=4, value_dim=3)


@pytest.mark.parametrize("q_rank", [None, 6])
def test_by_hand(q_rank):
  """Heads of the latent, one rotated key for all of them, scores of the whole width."""
  rope = Rope(factor=8.0, original_length=4, mscale_all_dim=0.5)
  layer = LatentAttention(4, 2, 7, rope=rope, q_rank=q_rank, **ARGUMENTS, key=jax.random.key(0))
  x_BLD, position_BL = jax.random.normal(jax.random.key(1), (1, 3, 4)), jnp.asarray([[0, 1, 2]])
  layer.latent_norm[...] = jax.random.normal(jax.random.key(2), (5,))
  y_BLD = layer(layer.queries(x_BLD, position_BL), layer.keys_values(x_BLD, position_BL),
                jnp.asarray([[[True, False, False], [True, True, False], [True] * 3]]))

  norm = lambda a: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6)
  x, turned = x_BLD[0], lambda a: rope.rotate(a[None], position_BL)[0]
  q = x if q_rank is None else norm(x @ layer.query_in[...])
  q = jnp.einsum("ld,dhp->lhp", q, layer.query[...])
  q = jnp.concatenate([q[..., :3], turned(q[..., 3:])], -1)
  c = norm(x @ layer.latent_in[...]) * layer.latent_norm[...][None]
  k_rope = turned((x @ layer.key_rope[...])[:, None])[:, 0]
  expected = 0
  for h in range(2):
    k = jnp.concatenate([c @ layer.key[...][:, h], k_rope], -1)
    p = jax.nn.softmax(q[1, h] @ k[:2].T * 7**-0.5 * (1 + 0.05 * np.log(8)) ** 2)
    expected += p @ (c @ layer.value[...][:, h])[:2] @ layer.out[...][h]
  np.testing.assert_allclose(y_BLD[0, 1], expected, rtol=1e-5, atol=1e-6)


def test_counts():
  """16 (5 + 4) into latent and rotated key, 5 x 2 (3 + 3) out of it, 16 x 2 x 7 queries, 2 x 3 x 16."""
  config = tiny(num_layers=1, num_experts=0, head_dim=7, attention=dict(name="latent", **ARGUMENTS))
  found = describe(config, VOCAB)
  attention = 16 * 9 + 5 * 2 * 6 + 16 * 14 + 6 * 16
  visible = (config.data.length + 1) / 2
  assert found["flops"]["attention"] == 2 * attention + 2 * 2 * (7 + 3) * visible
  assert found["layers"][0]["params"] == attention + 5 + 2 * 16 + 3 * 16 * 24
