import functools

import jax
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.config import default_config, image_tokens
from sparse_experts.models import build, names
from sparse_experts.models.vit import PatchEmbedding
from tests.models.tiny import init, jit

CLASSES = 5
ROUNDING = dict(rtol=1e-4, atol=1e-5)  # float32 sums in another order, through a few layers


def tiny(**model):
  """Three layers of width 16 on 8 x 8 images in four patches, layer 1 sparse with V-MoE's router."""
  c = default_config()
  c.model.update(dict(
      name="vit", num_layers=3, embed_dim=16, mlp_dim=24, num_heads=2, head_dim=8, activation="gelu",
      num_experts=4, moe_layers=(1,), group_size=10, capacity_factor=1.0, capacity_rule="vmoe", patch_size=4,
      representation_dim=12))
  c.model.router.update(dict(name="v_moe", k=2))
  c.data.objective = "softmax"
  router = model.pop("router", {})
  c.model.update(model)
  c.model.router.update(router)
  return c


def make_batch(rows=4, seed=0):
  rng = np.random.default_rng(seed)
  return {"images": rng.uniform(-1, 1, (rows, 8, 8, 3)).astype(np.float32),
          "targets": rng.integers(CLASSES, size=(rows, 1)).astype(np.int32),
          "shares": np.ones((rows, 1), np.float32), "weights": np.ones(rows, np.float32)}


def spread(params):
  """Parameters that start at zero, the head's too, as anything: a test of nothing but zeros tests nothing."""
  leaves, tree = jax.tree.flatten(params)
  noise = lambda i, a: np.float32(0.3 * np.random.default_rng(i).normal(size=a.shape))
  return jax.tree.unflatten(tree, [a + noise(i, a) for i, a in enumerate(leaves)])


@functools.cache
def case(phase="dropless", router="v_moe", **model):
  k = {} if router in ("expert_choice", "soft_moe") else {"k": 2}
  model |= {"router": {"name": router, "k": None} | k}
  model = build(tiny(**model), CLASSES, phase)
  params, buffers = init(model)
  return model, spread(params), buffers, jit(model.apply)


def by_hand(params, image, heads=2):
  """A dense ViT in float64 numpy: one image's logits, from parameters by layer."""
  p = {n: np.asarray(names.by_path(params)[at.path], np.float64)[
      slice(None) if at.repeat is None else at.repeat] for n, at in names.places(params).items()}

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]

  gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  patches = np.stack([image[i:i + 4, j:j + 4].ravel() for i in (0, 4) for j in (0, 4)])
  x = np.concatenate([p["embedding/cls"][None], patches @ p["embedding/w"] + p["embedding/b"]])
  x = x + p["embedding/position"]
  for layer in range(3):
    at = f"encoder/{layer:02d}/"
    h = norm(x, at + "attention_norm")
    q, k, v = (np.einsum("ld,dhp->hlp", h, p[f"{at}attention/{n}"])
               + p[f"{at}attention/{n}_bias"].reshape(heads, 1, -1) for n in ("query", "key", "value"))
    score = np.exp(np.einsum("hlp,hmp->hlm", q, k) / np.sqrt(q.shape[-1]))
    y = np.einsum("hlm,hmp->lhp", score / score.sum(-1, keepdims=True), v)
    x = x + np.einsum("lhp,hpd->ld", y, p[at + "attention/out"]) + p[at + "attention/out_bias"]
    h = norm(x, at + "ffn_norm")
    x = x + gelu(h @ p[at + "ffn/w_in"] + p[at + "ffn/b_in"]) @ p[at + "ffn/w_out"] + p[at + "ffn/b_out"]
  x = norm(x, "encoder/norm")[0]
  return np.tanh(x @ p["head/hidden_w"] + p["head/hidden_b"]) @ p["head/w"] + p["head/b"]


def test_a_dense_vit_by_hand():
  _, params, buffers, apply = case(num_experts=0)
  batch = make_batch()
  logits_BV, routings = apply(params, buffers, batch)
  assert not routings
  expected = [by_hand(params, np.float64(image)) for image in batch["images"]]
  np.testing.assert_allclose(logits_BV, expected, rtol=2e-4, atol=2e-5)


def test_patches_are_a_convolution():
  embedding = PatchEmbedding(6, 4, 6, False, key=jax.random.key(0))
  image_BHWC = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
  got = embedding(image_BHWC, np.float32) - embedding.position[...][None]
  kernel = embedding.w[...].reshape(4, 4, 3, 6)
  expected = jax.lax.conv_general_dilated(
      image_BHWC, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  np.testing.assert_allclose(got, expected.reshape(2, 6, 6), **ROUNDING)


def test_a_padded_row_takes_no_slot_and_leaks_nothing():
  """Under a capacity that drops: the last two images are padding, full of NaN."""
  model, params, buffers, apply = case("train")
  batch = make_batch()
  padded = {**batch, "weights": np.array([1, 1, 0, 0], np.float32)}
  poisoned = {**padded, "images": batch["images"].copy()}
  poisoned["images"][2:] = np.nan
  (expected, routing), (got, poisoned_routing) = (apply(params, buffers, b) for b in (padded, poisoned))
  np.testing.assert_array_equal(got[:2], expected[:2])
  assert poisoned_routing["encoder/01"].metrics["dropped"] == routing["encoder/01"].metrics["dropped"]
  assert routing["encoder/01"].metrics["dropped"][1] == 2 * model.tokens * 2  # two images, k = 2
  alone, _ = apply(params, buffers, {**padded, "images": np.where(
      np.arange(4)[:, None, None, None] < 2, batch["images"], 0.5)})
  np.testing.assert_array_equal(alone[:2], expected[:2])


@pytest.mark.parametrize("router", ["v_moe", "top_k", "expert_choice", "soft_moe"])
def test_images_do_not_see_each_other_without_drops(router):
  """But for a router that chooses among all tokens of a group."""
  _, params, buffers, apply = case(router=router)
  batch = make_batch()
  base = np.asarray(apply(params, buffers, batch)[0])
  other = {**batch, "images": np.concatenate([batch["images"][:3], -batch["images"][3:]])}
  moved = np.abs(np.asarray(apply(params, buffers, other)[0]) - base).max(-1) > 1e-4
  np.testing.assert_array_equal(moved, [False, False, router == "expert_choice", True])


@pytest.mark.slow
def test_a_mesh_changes_nothing():
  model, params, buffers, apply = case("train")
  batch = make_batch(rows=8)
  expected, _ = apply(params, buffers, batch)
  mesh = partitioning.make_mesh(2, 2, 2)
  with partitioning.use(mesh):
    placed = jax.device_put(params, partitioning.shardings(model.axes, mesh))
    rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
    got, _ = jit(model.apply)(placed, buffers, rows)
  np.testing.assert_allclose(got, expected, **ROUNDING)


def test_tokens_of_an_image():
  assert image_tokens(tiny()) == 5 and image_tokens(tiny(pool="mean")) == 4
