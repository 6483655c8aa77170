"""The optimizer sees matrices, however they are stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_experts import partitioning
from sparse_experts.config import default_config
from sparse_experts.errors import UserError
from sparse_experts.training import optimizer as opt
from sparse_experts.validation import validate


def _config(**kwargs):
  c = default_config()
  c.optimizer.update(kwargs)
  return c


def _grads(params, step):
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(step + 1), len(leaves))
  # Scales differ by expert and layer, so that sharing anything between matrices would show.
  return jax.tree.unflatten(tree, [
      jax.random.normal(k, p.shape) * jnp.exp(jax.random.normal(k, p.shape[:2] + (1,) * (p.ndim - 2)))
      for k, p in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("shape", [(2, 3, 8, 16), (2, 24, 8, 4)], ids=["E<D", "E>D"])
def test_stacked_adafactor_equals_each_matrix_alone(shape):
  """Also with more experts than features, where plain optax would factor over the experts."""
  axes = ("layers", "expert", "embed", "mlp")
  core = opt.adafactor_core(min_dim_size_to_factor=4)
  scale_E = jnp.arange(1.0, 1 + shape[1])
  stacked = {"w": jax.random.normal(jax.random.key(0), shape) * scale_E[None, :, None, None]}
  rule = opt.per_matrix(core, {"w": axes})
  state = rule.init(stacked)
  assert state.inner["w"][0].v_row.shape in [shape[:2] + (shape[2],), shape[:2] + (shape[3],)]
  alone = {(n, e): stacked["w"][n, e] for n in range(shape[0]) for e in range(shape[1])}
  alone_state = {i: core.init(p) for i, p in alone.items()}
  update, update_alone = jax.jit(rule.update), jax.jit(core.update)
  for step in range(4):
    grads = _grads(stacked, step)
    u, state = update(grads, state, stacked)
    stacked = optax.apply_updates(stacked, jax.tree.map(lambda x: -0.1 * x, u))
    for i in alone:
      u, alone_state[i] = update_alone(grads["w"][i], alone_state[i], alone[i])
      alone[i] = alone[i] - 0.1 * u
  for i, p in alone.items():
    np.testing.assert_allclose(stacked["w"][i], p, rtol=2e-6, atol=1e-6)  # reductions in another order


def test_stacked_axes_may_stand_anywhere():
  core = opt.adafactor_core(min_dim_size_to_factor=2)
  p = jax.random.normal(jax.random.key(0), (4, 3, 6, 2))  # embed, expert, mlp, layers
  g = jax.random.normal(jax.random.key(1), p.shape)
  moved = opt.per_matrix(core, ("embed", "expert", "mlp", "layers"))
  u, _ = moved.update(g, moved.init(p), p)
  for e in range(3):
    for n in range(2):
      expected, _ = core.update(g[:, e, :, n], core.init(p[:, e, :, n]), p[:, e, :, n])
      np.testing.assert_allclose(u[:, e, :, n], expected, rtol=1e-6, atol=1e-7)


def test_adafactor_equals_optax_on_one_matrix():
  c = _config(name="adafactor", clip_norm=0.0, weight_decay=0.0, schedule="constant", warmup_steps=0)
  ours = opt.make_optimizer(c, {"w": ("embed", "mlp")})
  theirs = optax.adafactor(c.optimizer.learning_rate)
  params = {"w": jax.random.normal(jax.random.key(0), (128, 130))}
  a, b = ours.init(params), theirs.init(params)
  for step in range(3):
    grads = _grads(params, step)
    ua, a = ours.update(grads, a, params)
    ub, b = theirs.update(grads, b, params)
    np.testing.assert_allclose(ua["w"], ub["w"], rtol=1e-6)


def test_weight_decay_falls_on_matrices_only():
  axes = {"embedding": ("vocab", "embed"), "query": ("layers", "embed", "heads", "head"),
          "norm": ("layers", "embed"), "bias": ("layers", "expert", "mlp"), "w": ("expert", "embed", "mlp"),
          "relative": ("buckets", "heads"), "scale": ("embed",)}
  params = {k: jnp.ones((2,) * len(a)) for k, a in axes.items()}
  zeros = jax.tree.map(jnp.zeros_like, params)
  for name in opt.OPTIMIZERS:
    rule = opt.make_optimizer(_config(name=name, weight_decay=0.5), axes)
    updates, _ = jax.jit(rule.update)(zeros, rule.init(params), params)
    assert {k for k, u in updates.items() if jnp.any(u != 0)} == {"embedding", "query", "w"}


def test_global_norm_is_clipped_before_anything_else():
  axes = {"w": ("embed", "mlp")}
  params = {"w": jnp.ones((2, 2))}
  big, small = ({"w": jnp.full((2, 2), v)} for v in (300.0, 0.5))  # of norm 600 and 1
  for clip, equal in ((1.0, True), (0.0, False)):
    rule = opt.make_optimizer(_config(clip_norm=clip, weight_decay=0.0), axes)
    moments = [jax.tree.leaves(rule.update(g, rule.init(params), params)[1]) for g in (big, small)]
    assert all(np.allclose(a, b) for a, b in zip(*moments, strict=True)) == equal


@pytest.mark.parametrize("name, warmup, values", [
    ("cosine", 10, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}),
    ("rsqrt", 10, {0: 0.1, 9: 1.0, 10: 1.0, 40: 0.5, 1000: 0.1}),
    ("constant", 10, {0: 0.1, 9: 1.0, 5000: 1.0}),
    ("rsqrt_held", 10, {0: 1.0, 9: 1.0, 10: 1.0, 40: 0.5, 1000: 0.1}),
    ("cosine", 0, {0: 1.0, 50: 0.5}),
    ("rsqrt", 0, {0: 1.0, 1: 1.0, 100: 0.1}),
    ("constant", 1, {0: 1.0, 1: 1.0}),
])
def test_schedules(name, warmup, values):
  c = _config(schedule=name, warmup_steps=warmup, learning_rate=2.0)
  c.train.steps = 100
  schedule = opt.make_schedule(c)
  for step, value in values.items():
    np.testing.assert_allclose(schedule(step), 2.0 * value, rtol=1e-5, atol=1e-7)


def test_state_axes_follow_the_parameters():
  axes = {"block": {"w": ("layers", "expert", "embed", "mlp")}, "w": ("vocab", "embed")}
  shapes = {"block": {"w": (2, 3, 128, 256)}, "w": (384, 128)}
  params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes,
                        is_leaf=lambda x: isinstance(x, tuple))
  for name in opt.OPTIMIZERS:
    rule = opt.make_optimizer(_config(name=name), axes)
    state = jax.eval_shape(rule.init, params)
    found = opt.state_axes(state, params, axes)
    named = {(leaf.shape, a) for leaf, a in zip(
        jax.tree.leaves(state), jax.tree.leaves(found, is_leaf=partitioning.is_axes), strict=True)}
    expected = {
        "adamw": {((2, 3, 128, 256), axes["block"]["w"]), ((384, 128), axes["w"]), ((), ())},
        "adafactor": {((2, 3, 128), ("layers", "expert", "embed")),
                      ((2, 3, 256), ("layers", "expert", "mlp")),
                      ((2, 3, 1), ("layers", "expert", None)), ((2, 3), ("layers", "expert")),
                      ((384,), ("vocab",)), ((128,), ("embed",)), ((1,), (None,)), ((), ())},
    }[name]
    assert named == expected


def test_unknown_names_are_refused():
  with pytest.raises(UserError, match="did you mean 'adamw'"):
    validate(_config(name="adam"))
  with pytest.raises(UserError, match="did you mean 'cosine'"):
    validate(_config(schedule="cosin"))
