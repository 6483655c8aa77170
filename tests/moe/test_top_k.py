"""Many choices: the experts, values and gradients of a sort, from a program that does not grow with k."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparse_experts.moe.routing import rounds, scores

CASES = [(60, 9), (64, 64), (17, 17), (512, 12), (3000, 10)]  # experts, choices; 3000: blocks of 32, not 64


def drawn(E, kind="normal"):
  rng = np.random.default_rng(E)
  shape = (2, 5, E)
  values = {"normal": rng.normal, "ties": functools.partial(rng.integers, 3), "equal": np.zeros}[kind]
  return jnp.asarray(values(shape) if kind == "equal" else values(size=shape), jnp.float32)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
@pytest.mark.parametrize("E, k", CASES)
def test_many_choices_are_those_of_a_stable_sort(E, k, kind):
  score_GTE = drawn(E, kind)
  expert_GTK, value_GTK = scores.top_k(score_GTE, k)
  wanted = np.argsort(-np.asarray(score_GTE), axis=-1, kind="stable")[..., :k]
  np.testing.assert_array_equal(expert_GTK, wanted)
  np.testing.assert_array_equal(value_GTK, np.take_along_axis(np.asarray(score_GTE), wanted, -1))
  assert expert_GTK.dtype == jnp.int32


@pytest.mark.parametrize("kind", ["normal", "ties", "nan", "masked"])
def test_loops_choose_what_rounds_that_are_written_out_choose(kind):
  score_GTE = drawn(24, kind if kind == "ties" else "normal")
  if kind == "nan":
    score_GTE = score_GTE.at[0, 1, 3:5].set(jnp.nan)
  if kind == "masked":  # more choices than experts that are allowed
    score_GTE = score_GTE.at[:, :, 4:].set(-jnp.inf)
  for k in (1, 5, 8):
    np.testing.assert_array_equal(rounds.in_a_loop(score_GTE, k), rounds.written_out(score_GTE, k))


@pytest.mark.parametrize("E, k", CASES[:2])
def test_gradients_of_many_choices(E, k):
  score_GTE, weight_11K = drawn(E), jnp.arange(1.0, k + 1)[None, None]
  ours = jax.grad(lambda s: (scores.top_k(s, k)[1] * weight_11K).sum())(score_GTE)
  theirs = jax.grad(lambda s: (jax.lax.top_k(s, k)[0] * weight_11K).sum())(score_GTE)
  np.testing.assert_array_equal(ours, theirs)


def test_many_values_at_their_experts_and_back():
  E, k = 20, 12
  expert_GTK, value_GTK = scores.top_k(drawn(E), k)
  placed_GTE = scores.scatter_to_experts(value_GTK, expert_GTK, E)
  wanted = np.zeros((2, 5, E), np.float32)
  np.put_along_axis(wanted, np.asarray(expert_GTK), np.asarray(value_GTK), -1)
  np.testing.assert_array_equal(placed_GTE, wanted)
  weight_11E = jnp.arange(1.0, E + 1)[None, None]
  d_GTK = jax.grad(lambda v: (scores.scatter_to_experts(v, expert_GTK, E) * weight_11E).sum())(value_GTK)
  np.testing.assert_array_equal(d_GTK, weight_11E[0, 0][expert_GTK])


def size_of(k):
  """Operations of the program of values and gradient, those in loops included."""
  whole = jax.value_and_grad(lambda s: scores.top_k(s, k)[1].sum())
  return str(jax.make_jaxpr(whole)(drawn(512))).count(" = ")


def test_the_program_does_not_grow_with_k():
  assert size_of(10) == size_of(500) < 300


def test_each_device_chooses_for_its_own_groups():
  """No score crosses devices, forward or backward; seeds that are trained together have theirs."""
  mesh = jax.make_mesh((8,), ("data",))
  by_group = NamedSharding(mesh, PartitionSpec("data"))
  f = jax.jit(jax.value_and_grad(lambda s: (scores.top_k(s, 10)[1] ** 2).sum(), has_aux=False),
              in_shardings=by_group, out_shardings=(None, by_group))
  text = f.lower(jax.ShapeDtypeStruct((8, 4, 32), jnp.float32)).compile().as_text()
  assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
  many = jnp.stack([drawn(32), -drawn(32)])
  one_by_one = jnp.stack([scores.top_k(s, 10)[0] for s in many])
  np.testing.assert_array_equal(jax.vmap(functools.partial(scores.top_k, k=10))(many)[0], one_by_one)
