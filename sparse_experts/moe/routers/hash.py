"""Hash layers: the expert is a fixed function of the token's id; nothing is learned."""

import heapq
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.routing import Router, Routing, Tokens, lists

ASSIGNS = ("random", "balanced", "table")
ROUNDS = 300  # of k-means, at most


class Fixed(nnx.Variable):
  """A part of a hash function: drawn or computed once, saved with the run, never changed."""


class HashRouter(Router):
  """Roller et al. 2021: the expert is a fixed function of the token's id, at any position.

  Gates are 1, there is no loss, and vectors are not read. Each layer draws its own functions.

  k: number of hash functions. Function j chooses among the j-th of k equal parts of the experts, and outputs
    are added: Σ_j B_j relu(A_j h). This is not the paper's MultiHash, in which every B_j reads the hidden
    units of all A_1 to A_k and gives a part of the output: hidden units would travel between experts.
  assign: `random`: every id goes to a random expert. `balanced`: from the most to the least frequent id, each
    goes to the expert with the fewest tokens so far; needs `counts`. `table`: as `table` says. The paper's
    clustered and dispersed hashes are tables made from another model's embeddings, by `clustered` and
    `dispersed` below.
  counts: how often each id occurs, from id 0. table: the expert of each id, from id 0. Ids beyond their
    length go to a random expert. Both are for k = 1.
  """

  held_to = "cases by hand, by the paper's formula"
  causality = "self"
  drop_causality = "past"

  def __init__(self, d: int, num_experts: int, k: int = 1, *, assign: str = "random",
               counts: Sequence[int] = (), table: Sequence[int] = (), rngs: nnx.Rngs):
    check(1 <= k <= num_experts and num_experts % k == 0, "router.k", k,
          f"hash functions do not divide num_experts={num_experts}; choose a divisor: each function has its"
          " own equal part of the experts")
    check_known("router.assign", assign, ASSIGNS)
    for name, given, goes_with in (("counts", counts, "balanced"), ("table", table, "table")):
      if (assign == goes_with) != (len(given) > 0):
        raise UserError(f"router.{name} is {'' if len(given) else 'not '}given with router.assign='{assign}';"
                        f" it goes with '{goes_with}'")
    check(assign == "random" or k == 1, "router.k", k,
          f"with router.assign='{assign}': that is one function; choose k=1 or 'random'")
    if assign == "balanced":
      table = balance(counts, num_experts).tolist()
    if outside := [expert for expert in table if not 0 <= expert < num_experts]:
      raise UserError(f"router.table names expert {outside[0]}; experts are 0 to {num_experts - 1}")
    self.num_experts, self.k = num_experts, k
    self.salt_K = Fixed(jax.random.bits(rngs.params(), (k,), jnp.uint32))
    self.table_V = Fixed(jnp.asarray(np.asarray(table, np.int32))) if len(table) else None

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    if tokens.id is None:
      raise UserError("router 'hash' needs token ids, but tokens.id is None; give the layer Tokens(id=...)")
    part = self.num_experts // self.k
    hash_GTK = lists.scramble(tokens.id[..., None], self.salt_K[...][None, None])
    expert_GTK = (hash_GTK % jnp.uint32(part)).astype(jnp.int32) + jnp.arange(
        0, self.num_experts, part, dtype=jnp.int32)[None, None]
    if self.table_V is not None:
      known_GT = tokens.id < self.table_V.shape[0]
      by_table_GT = self.table_V[...][jnp.where(known_GT, tokens.id, 0)]
      expert_GTK = jnp.where(known_GT, by_table_GT, expert_GTK[..., 0])[..., None]
    return lists.fixed(expert_GTK, tokens.mask, self.num_experts)


def balance(counts: Sequence[int], num_experts: int) -> np.ndarray:
  """The expert of each id, int32: most frequent first, each to the expert with the fewest tokens so far."""
  queue = [(0, expert) for expert in range(num_experts)]
  table = np.zeros(len(counts), np.int32)
  for i in np.argsort(-np.asarray(counts), kind="stable"):
    tokens, expert = heapq.heappop(queue)
    table[i] = expert
    heapq.heappush(queue, (tokens + int(counts[i]), expert))
  return table


def clustered(embedding_VD: np.ndarray, num_experts: int, seed: int = 0) -> np.ndarray:
  """A table that sends ids with near embeddings to one expert, int32 _V: k-means with a cluster per expert.

  From a trained run's embeddings:

      table = clustered(sparse_experts.load(DIR).params["embedding"]["table"], 8)
      with config.unlocked():
        config.model.router.update(dict(name="hash", assign="table", table=tuple(table.tolist())))

  Lloyd's rounds until nothing changes. The first means are rows drawn with `seed` in proportion to their
  squared distance from those drawn before (k-means++); an empty cluster takes the row farthest from its mean.
  The authors do not say how they initialise.
  """
  x_VD, draw = np.asarray(embedding_VD, np.float64), np.random.default_rng(seed)
  if not 1 <= num_experts <= len(x_VD):
    raise UserError(f"num_experts={num_experts} clusters of {len(x_VD)} embeddings; choose 1 to {len(x_VD)}")
  squares = lambda mean_ED: np.maximum(
      (x_VD**2).sum(1)[:, None] - 2 * x_VD @ mean_ED.T + (mean_ED**2).sum(1), 0.0)
  mean_ED = x_VD[[draw.integers(len(x_VD))]]
  while len(mean_ED) < num_experts:
    left_V = squares(mean_ED).min(1)
    row = draw.choice(len(x_VD), p=left_V / left_V.sum() if left_V.any() else None)
    mean_ED = np.concatenate([mean_ED, x_VD[[row]]])
  table = np.full(len(x_VD), -1)
  for _ in range(ROUNDS):
    square_VE = squares(mean_ED)
    before, table = table, square_VE.argmin(1)
    for e in np.setdiff1d(np.arange(num_experts), table):
      shared_V = np.bincount(table, minlength=num_experts)[table] > 1
      farthest = np.where(shared_V, square_VE.min(1), -1.0).argmax()
      table[farthest], square_VE[farthest] = e, 0.0
    if (table == before).all():
      break
    mean_ED = np.stack([x_VD[table == e].mean(0) for e in range(num_experts)])
  return table.astype(np.int32)


def dispersed(embedding_VD: np.ndarray, num_experts: int, seed: int = 0) -> np.ndarray:
  """A table that spreads the ids of each of `clustered`'s clusters evenly over the experts, int32 _V."""
  table = np.zeros(len(embedding_VD), np.int32)
  by_cluster = np.argsort(clustered(embedding_VD, num_experts, seed), kind="stable")
  table[by_cluster] = np.arange(len(table)) % num_experts
  return table
