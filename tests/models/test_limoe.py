"""A tower of images and texts: modalities meet in routing groups only, padding nowhere, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.models import build, describe
from sparse_experts.models.limoe import IMAGE, TEXT
from sparse_experts.moe import Routing
from sparse_experts.tasks import task_of
from sparse_experts.training import objectives
from tests.models.test_vit import spread
from tests.models.test_vit import tiny as tiny_vit
from tests.models.tiny import init, jit

WORDS, LENGTH, PATCHES = 12, 5, 4


def tiny(**model):
  """Three layers of width 16 on 8 x 8 images in four patches and texts of up to 5 words; layer 1 sparse."""
  c = tiny_vit(**dict(name="limoe", pool="mean", group_size=2 * (PATCHES + LENGTH), capacity_factor=0.75,
                      capacity_rule="vmoe_paper") | model)
  c.data.objective, c.data.length = "contrastive", LENGTH
  return c


def make_batch(rows=4, seed=0):
  """Texts of 2 to 5 words."""
  rng = np.random.default_rng(seed)
  return {"images": rng.uniform(-1, 1, (rows, 8, 8, 3)).astype(np.float32),
          "texts": rng.integers(3, WORDS, (rows, LENGTH)).astype(np.int32),
          "text_mask": np.arange(LENGTH)[None] < rng.integers(2, LENGTH + 1, (rows, 1)),
          "weights": np.ones(rows, np.float32)}


@functools.cache
def case(phase="dropless", router="limoe", **model):
  k = {} if router == "expert_choice" else {"k": 1}
  model = build(tiny(**model, router={"name": router, "k": None} | k), WORDS, phase)
  params, buffers = init(model)
  return model, spread(params), buffers, jit(functools.partial(model.apply, trace=True))


@pytest.mark.slow
def test_shapes_and_what_routers_see():
  model, params, buffers, apply = case()
  batch = make_batch()
  logits_BC, routings = apply(params, buffers, batch)
  assert logits_BC.shape == (4, 4) and logits_BC.dtype == jnp.float32
  vectors, _ = jit(model.vectors)(params, buffers, batch)
  for v_BR in vectors:
    assert v_BR.shape == (4, 12)
    np.testing.assert_allclose(np.linalg.norm(v_BR, axis=-1), 1.0, rtol=1e-5)
  scale = np.exp(params["head"]["log_scale"][0])
  np.testing.assert_allclose(logits_BC, scale * vectors[0] @ vectors[1].T, rtol=1e-5)
  np.testing.assert_array_equal(model.modality_L, [IMAGE] * PATCHES + [TEXT] * LENGTH)
  # One group of two rows has tokens of both; padding is in no loss and no count.
  routing = routings["encoder/01"]
  assert routing.token.shape == (2, 2 * (PATCHES + LENGTH))
  assert routing.losses["local_entropy_0"][1] == routing.losses["local_entropy_1"][1] == 2
  assert int(routing.metrics["dropped"][1]) == 4 * PATCHES + batch["text_mask"].sum()


@pytest.mark.slow
def test_modalities_and_rows_do_not_see_each_other_without_drops():
  """But for a router that chooses among all tokens of a group: there a text may take an image's place."""
  batch = make_batch()
  other = {**batch, "texts": np.where(np.arange(4)[:, None] == 1, 3 + batch["texts"] % 7, batch["texts"])}
  moved = {}
  for router in ("limoe", "expert_choice"):
    model, params, buffers, _ = case(router=router)
    vectors = jit(model.vectors)
    before, after = (vectors(params, buffers, b)[0] for b in (batch, other))
    moved[router] = [np.abs(a - b).max(-1) > 1e-4 for a, b in zip(before, after)]
  np.testing.assert_array_equal(moved["limoe"], [[False] * 4, [False, True, False, False]])
  assert moved["expert_choice"][0].any()


@pytest.mark.slow
def test_padding_changes_nothing():
  """Under a capacity that drops: what stands where a text has ended, and NaN in rows that are no pair."""
  model, params, buffers, apply = case("train")
  batch = make_batch() | {"weights": np.array([1, 1, 0, 0], np.float32)}
  text_BL = np.where(batch["text_mask"], batch["texts"], 7)
  poisoned = {**batch, "texts": text_BL, "images": batch["images"].copy()}
  poisoned["images"][2:] = np.nan
  (expected, routing), (got, other) = (apply(params, buffers, b) for b in (batch, poisoned))
  np.testing.assert_array_equal(got[:2, :2], expected[:2, :2])
  assert routing["encoder/01"].metrics["dropped"] == other["encoder/01"].metrics["dropped"]
  assert other["encoder/01"].metrics["dropped"][0] > 0
  measure = jit(functools.partial(task_of(tiny()).eval_sums, model))
  sums = [jax.device_get(measure(params, buffers, b)) for b in (batch, poisoned)]
  jax.tree.map(np.testing.assert_array_equal, *sums)
  assert float(sums[0]["loss"][1]) == 2


def objective(model, params, buffers, batch, key=None):
  sums = task_of(tiny()).train_sums(model, params, buffers, batch, key)
  weights = objectives.loss_weights(model)
  return objectives.total(sums, objectives.whole(sums), weights, dict.fromkeys(weights, "mean"))[0]


@pytest.mark.slow
def test_gradient_reaches_every_parameter():
  model, params, buffers, _ = case("train")
  batch = make_batch(rows=8)
  batch["text_mask"] = np.ones((8, LENGTH), bool)  # else a last position is in no text
  key = jax.random.key(0)  # with noise, which the load loss is about
  grads = jit(jax.grad(lambda p: objective(model, p, buffers, batch, key)))(params)
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads)
           if not np.abs(g).max() > 0]
  assert not still


@pytest.mark.slow
def test_a_mesh_changes_nothing():
  """Loss, over all pairs of the batch, and gradient, on one device and on eight."""
  model, params, buffers, _ = case("train", num_experts=8)
  batch = make_batch(rows=16)
  value = jit(jax.value_and_grad(lambda p, b: objective(model, p, buffers, b)))
  loss, grads = value(params, batch)
  mesh = partitioning.make_mesh(2, 2, 2)
  with partitioning.use(mesh):
    placed = jax.device_put(params, partitioning.shardings(model.axes, mesh))
    rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
    on_mesh = jit(jax.value_and_grad(lambda p, b: objective(model, p, buffers, b)))
    other_loss, other = on_mesh(placed, rows)
  np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), other, grads)


def test_a_router_that_learns_from_rewards_gets_its_pairs():
  class Model:
    mask = staticmethod(lambda batch: jnp.array([[True, True, False], [True, True, True]]))

    def apply(self, params, buffers, batch, key=None):
      learns = Routing(None, None, None, None, log_prob=jnp.full((2, 3), -1.0), value=jnp.zeros((2, 3)))
      return jnp.array([[2.0, 0.0], [1.0, 0.0]]), {"encoder/00": learns}

  batch = {"images": None, "texts": None, "weights": jnp.ones(2)}
  sums = task_of(tiny()).train_sums(Model(), {}, {}, batch)
  lse = lambda *x: np.log(np.exp(x).sum())
  pair = [(lse(2, 0) - 2 + lse(2, 1) - 2) / 2, (lse(1, 0) + lse(0, 0)) / 2]
  policy, count = sums["layers"]["encoder/00"]["losses"]["policy"]
  assert (float(policy), int(count)) == (pytest.approx(-(2 * pair[0] + 3 * pair[1])), 5)


def test_counts_by_hand():
  """Attention of each modality to itself only; projections read once a row; the comparison left out."""
  found = describe(tiny(num_experts=0, num_layers=1, moe_layers=()), WORDS)
  tokens = PATCHES + LENGTH
  seen = (PATCHES**2 + LENGTH**2) / tokens
  d, inner = 16, 16
  assert found["flops"]["attention"] == 2 * 4 * d * inner + 4 * inner * seen
  assert found["executed_flops"]["attention"] == 2 * 4 * d * inner + 4 * inner * tokens
  assert found["flops"]["head"] == pytest.approx(2 * 2 * d * 12 / tokens)
  assert found["flops"]["embedding"] == pytest.approx(2 * 48 * d * PATCHES / tokens)


def test_tokens_of_a_row():
  assert task_of(tiny()).stack_tokens() == {"encoder": ("image and text tokens", PATCHES + LENGTH)}
  model = case()[0]
  assert model.length("encoder/01", {}) == PATCHES + LENGTH and model.row_quantum({}, 2) == 4
  np.testing.assert_array_equal(model.mask(make_batch() | {"weights": np.zeros(4)}), False)
