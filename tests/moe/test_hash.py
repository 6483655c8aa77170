"""Hash layers: the id alone decides, evenly by what is counted, without twins among several hashes."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, MoELayer, Tokens, make_router
from sparse_experts.moe.routers.hash import balance, clustered, dispersed

IDS = 3000
TOKENS = Tokens(mask=jnp.ones((1, IDS), bool), id=jnp.arange(IDS, dtype=jnp.int32)[None])


def router(num_experts=8, seed=0, **fields):
  return make_router("hash", 2, num_experts, rngs=nnx.Rngs(seed), **fields)


def experts(r, tokens=TOKENS, fill=0.0):
  routing = r(jnp.full((*tokens.id.shape, 2), fill), tokens, None)
  return np.asarray(routing.expert).reshape(*tokens.id.shape, r.k)


def test_the_id_alone_decides():
  """Neither the vector, nor the place, nor the neighbours."""
  r = router()
  found = experts(r)
  np.testing.assert_array_equal(found, experts(r, fill=7.0))
  np.testing.assert_array_equal(found[:, ::-1], experts(r, TOKENS.replace(id=TOKENS.id[:, ::-1])))
  assert (experts(router(seed=1)) != found).mean() > 0.8, "each layer has its own function"


def test_random_is_even_over_ids_and_functions_are_independent():
  """Chi-squared of 3000 ids over 8 experts (7 degrees of freedom) and 16 pairs, 0.999 quantile."""
  chi = lambda count, n: ((count - IDS / n) ** 2 / (IDS / n)).sum()
  assert chi(np.bincount(experts(router()).ravel(), minlength=8), 8) < 24.3
  one, other = experts(router(k=2))[0].T
  assert one.max() == 3 and other.min() == 4 and other.max() == 7, "each function has its own experts"
  assert chi(np.bincount(one * 4 + other - 4, minlength=16), 16) < 37.7


def test_outputs_of_several_functions_are_added():
  """1 (3, 4) + 2 (5, 6). MultiHash is another function: with the same numbers it gives (11, 17)."""
  layer = MoELayer(router(2, k=2), Experts(2, 2, 1, rngs=nnx.Rngs(0)))
  layer.experts.w_in[...] = jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]])
  layer.experts.w_out[...] = jnp.array([[[3.0, 4.0]], [[5.0, 6.0]]])
  y_GTD, _ = layer(jnp.array([[[1.0, 2.0]]]), Tokens(id=jnp.array([[7]])))
  np.testing.assert_allclose(y_GTD, [[[13, 16]]], rtol=1e-6)


def test_balanced_by_hand():
  """7 tokens each: 5 | 3, then 2 to the second, 2 to the first, 1 and 1 to the second."""
  assert balance([1, 5, 2, 3, 2, 1], 2).tolist() == [1, 0, 1, 1, 0, 1]
  r = router(2, assign="balanced", counts=[1, 5, 2, 3, 2, 1])
  found = experts(r)[0, :, 0]
  assert found[:6].tolist() == [1, 0, 1, 1, 0, 1]
  assert 0.4 < found[6:].mean() < 0.6, "ids that were not counted go anywhere"


def test_a_frequency_law_is_balanced_where_random_is_not():
  counts = (1e6 / np.arange(10, IDS + 10)).astype(int)
  load = lambda r: np.bincount(experts(r).ravel(), counts, minlength=8) / counts.sum() * 8
  assert np.abs(load(router(assign="balanced", counts=counts)) - 1).max() < 1e-3
  assert np.abs(load(router()) - 1).max() > 0.05


def test_a_table_is_taken_as_it_is():
  assert experts(router(assign="table", table=(3, 1, 7)))[0, :3, 0].tolist() == [3, 1, 7]


def blobs():
  """Ids around three far-off places, 30, 20 and 10 of them, in mixed order: (embedding_VD, place_V)."""
  rng = np.random.default_rng(0)
  place_V = rng.permutation(np.repeat([0, 1, 2], [30, 20, 10]))
  return np.array([[0, 0], [9, 0], [0, 9]])[place_V] + 0.5 * rng.normal(size=(60, 2)), place_V


def test_clustered_ids_share_an_expert_with_their_neighbours():
  """From ten seeds; an expert is a place, and the table is one of a router."""
  embedding_VD, place_V = blobs()
  for seed in range(10):
    table = clustered(embedding_VD, 3, seed)
    assert len(set(zip(table.tolist(), place_V.tolist(), strict=True))) == 3
  np.testing.assert_array_equal(table, clustered(embedding_VD, 3, seed))
  r = router(3, assign="table", table=tuple(table.tolist()))
  np.testing.assert_array_equal(experts(r)[0, :60, 0], table)


def test_k_means_ends_where_every_id_has_its_nearest_mean():
  embedding_VD = np.random.default_rng(1).normal(size=(200, 4))
  table = clustered(embedding_VD, 7)
  mean_ED = np.stack([embedding_VD[table == e].mean(0) for e in range(7)])
  nearest = ((embedding_VD[:, None] - mean_ED) ** 2).sum(-1).argmin(1)
  np.testing.assert_array_equal(table, nearest)


def test_no_cluster_is_empty():
  """Fewer places than experts: some take one of several equal rows."""
  embedding_VD = np.concatenate([np.zeros((50, 2)), np.eye(2)])
  assert set(clustered(embedding_VD, 5).tolist()) == set(range(5))
  assert sorted(clustered(np.eye(4), 4).tolist()) == [0, 1, 2, 3]


def test_dispersed_ids_part_from_their_neighbours():
  """Each place's ids go evenly to all experts, and so do all ids."""
  embedding_VD, place_V = blobs()
  table = dispersed(embedding_VD, 3)
  for place, even in enumerate([10, 20 / 3, 10 / 3]):
    assert np.abs(np.bincount(table[place_V == place], minlength=3) - even).max() < 1
  assert np.bincount(table).tolist() == [20, 20, 20]


def test_more_clusters_than_embeddings():
  with pytest.raises(UserError, match="num_experts=5 clusters of 4 embeddings; choose 1 to 4"):
    clustered(np.eye(4), 5)


@pytest.mark.parametrize("fields, message", [
    (dict(k=3), "router.k=3 hash functions do not divide num_experts=8"),
    (dict(assign="balance"), "router.assign='balance' is unknown; did you mean 'balanced'"),
    (dict(assign="balanced"), "router.counts is not given with router.assign='balanced'; it goes with"),
    (dict(table=(1,)), "router.table is given with router.assign='random'; it goes with 'table'"),
    (dict(assign="table", table=(8,)), "router.table names expert 8; experts are 0 to 7"),
    (dict(assign="table", table=(1,), k=2), "router.k=2 with router.assign='table': that is one function"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)


def test_ids_must_be_there():
  with pytest.raises(UserError, match="router 'hash' needs token ids, but tokens.id is None"):
    router()(jnp.zeros((1, 3, 2)), Tokens(mask=jnp.ones((1, 3), bool)), None)
