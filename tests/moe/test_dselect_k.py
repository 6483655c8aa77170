"""DSelect-k: codes, what happens where some are nobody's, and gates that become exactly zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router

D, T = 6, 32
QUICK = {"xla_backend_optimization_level": 0}
MASK_GT = jnp.ones((1, T), bool)


@functools.cache
def router(E=8, **fields):
  return make_router("dselect_k", D, E, rngs=nnx.Rngs(params=0), **fields)


@functools.cache
def compiled(E, k, gamma):
  return jax.jit(router(E, k=k, gamma=gamma).route, compiler_options=QUICK)


def route(code_GTKB, select_GTK=None, E=8, mask_GT=None, gamma=1.0):
  """The routing of given z."""
  code_GTKB = jnp.asarray(code_GTKB, jnp.float32)
  shape = code_GTKB.shape[:3]
  select_GTK = jnp.zeros(shape) if select_GTK is None else jnp.asarray(select_GTK, jnp.float32)
  mask_GT = jnp.ones(shape[:2], bool) if mask_GT is None else mask_GT
  return compiled(E, shape[2], gamma)(code_GTKB, select_GTK, mask_GT)


def dense(routing, E):
  """gate_GTE of what is valid."""
  gate_GTE = np.zeros((*routing.prob.shape[:2], E))
  g, a = np.nonzero(routing.valid)
  np.add.at(gate_GTE, (g, routing.token[g, a], routing.expert[g, a]), routing.gate[g, a])
  return gate_GTE


def draw(k, bits, scale, seed=0):
  return scale * np.random.default_rng(seed).normal(size=(1, T, k, bits)).astype(np.float32)


def slow_gates(code_KB, select_K, E, gamma):
  """One token's, as the definition says, in Python."""
  step = lambda t: float(np.clip(-2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5, 0, 1)) if (
      abs(t) < gamma / 2) else float(t > 0)
  r_KE = np.ones((len(code_KB), E))
  for j, code_B in enumerate(code_KB):
    for i in range(E):
      for bit, z in zip(np.binary_repr(i, len(code_B)), code_B, strict=True):
        r_KE[j, i] *= step(z) if bit == "1" else 1 - step(z)
  alpha_K = np.exp(select_K) / np.exp(select_K).sum()
  return alpha_K @ r_KE, r_KE


@pytest.mark.parametrize("E, bits", [(2, 1), (3, 2), (5, 3), (8, 3), (9, 4)])
def test_gates_and_losses_are_their_definitions(E, bits):
  code, select = draw(2, bits, 0.4), draw(1, 2, 1.0, seed=1)[:, :, 0]
  mask_GT = MASK_GT.at[0, 5].set(False)
  routing = route(np.where(np.arange(T) == 5, np.nan, code.swapaxes(1, 3)).swapaxes(1, 3), select, E, mask_GT)
  real = [t for t in range(T) if t != 5]
  slow = [slow_gates(code[0, t].astype(np.float64), select[0, t], E, 1.0) for t in real]
  gate_TE, r_TKE = np.stack([g for g, _ in slow]), np.stack([r for _, r in slow])
  np.testing.assert_allclose(dense(routing, E)[0, real], gate_TE, atol=1e-6)  # float32 products below 1
  np.testing.assert_allclose(
      routing.losses["selection_entropy"], (-(r_TKE * np.log(r_TKE + 1e-6)).sum(), T - 1), rtol=1e-5)
  if E in (2, 8):
    assert set(routing.losses) == {"selection_entropy"} and "gate_sum" not in routing.metrics
    np.testing.assert_allclose(gate_TE.sum(-1), 1)
  else:
    np.testing.assert_allclose(routing.losses["inverse_mass"],
                               ((1 / np.maximum(r_TKE.sum(-1), 1e-6)).sum(), T - 1), rtol=1e-4)
    np.testing.assert_allclose(routing.metrics["gate_sum"], (gate_TE.sum(), T - 1), rtol=1e-5)
    assert gate_TE.sum(-1).max() <= 1 + 1e-6
  np.testing.assert_allclose(np.asarray(routing.prob)[0, real],
                             gate_TE / gate_TE.sum(-1, keepdims=True), atol=1e-6)


def test_one_expert_has_no_bits():
  given = router(1, k=1)
  assert set(nnx.to_pure_dict(nnx.state(given))) == {"w_select", "b_select"}
  routing = given(jnp.ones((1, 2, D)), Tokens(mask=jnp.ones((1, 2), bool)), None)
  np.testing.assert_array_equal(routing.gate, 1)
  assert routing.losses["selection_entropy"][0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("E, total", [(3, 0.75), (6, 0.75), (5, 0.625), (9, 0.5625), (8, 1.0)])
def test_at_zero_all_codes_are_alike(E, total):
  bits = (E - 1).bit_length()
  routing = route(np.zeros((1, T, 2, bits)), E=E)
  np.testing.assert_allclose(dense(routing, E)[0], 1 / 2**bits, rtol=1e-6)
  if total < 1:
    np.testing.assert_allclose(routing.metrics["gate_sum"][0] / T, total, rtol=1e-6)
    np.testing.assert_allclose(routing.losses["inverse_mass"][0] / T, 2 / total, rtol=1e-6)


@pytest.mark.parametrize("E", [8, 5])
def test_hard_bits_leave_at_most_k_experts(E):
  """Gates of the others are exactly 0 and not valid; the sum is 1 only if all codes are somebody's."""
  bits, code = (E - 1).bit_length(), draw(3, (E - 1).bit_length(), 1e3)
  routing = route(code, draw(1, 3, 1.0, seed=1)[:, :, 0], E)
  gate_TE = dense(routing, E)[0]
  chosen_TK = (code[0] > 0) @ (1 << np.arange(bits)[::-1])
  for gate_E, chosen_K in zip(gate_TE, chosen_TK, strict=True):
    assert set(np.flatnonzero(gate_E)) == {c for c in chosen_K if c < E}
    assert gate_E.sum() == pytest.approx(1, rel=1e-6) if (chosen_K < E).all() else gate_E.sum() < 1
  assert int(routing.metrics["experts_per_token"][0]) == (gate_TE > 0).sum() <= 3 * T
  if E == 5:  # codes 5, 6 and 7 are nobody's: 1 / 1e-6 for each selector there
    assert (chosen_TK >= E).any()
    np.testing.assert_allclose(routing.losses["inverse_mass"][0],
                               1e6 * (chosen_TK >= E).sum() + (chosen_TK < E).sum(), rtol=1e-5)


def test_lost_selectors_have_finite_gradients():
  """Bits beyond all reason, on a code that is nobody's: no expert, and nothing learns from it."""
  given = router(5, k=1)

  def total(code):
    routing = given.route(code, jnp.zeros((1, 1, 1)), jnp.ones((1, 1), bool))
    return routing.gate.sum() + sum(pair[0] for pair in routing.losses.values()), routing

  gradient = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)
  for code in ([1.0, 1.0, 1.0], [1e20, 1e20, 1e20]):
    grad, routing = gradient(jnp.asarray(code).reshape(1, 1, 1, 3))
    assert not routing.valid.any() and not grad.any()
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((routing.losses, routing.metrics)))


@pytest.mark.parametrize("E", [8, 5])
def test_the_losss_slope_is_continuous_where_bits_harden(E):
  """Of the output and all losses, in one z across its end, the others inside."""
  given = router(E, k=2)
  y_E = jnp.arange(1.0, E + 1)

  def loss(z):
    code = jnp.array([[[[0.1, -0.2, 0.05], [-0.3, 0.2, 0.15]]]]).at[0, 0, 0, 1].set(z)
    routing = given.route(code, jnp.array([[[0.3, -0.1]]]), jnp.ones((1, 1), bool))
    y = (jnp.where(routing.valid, routing.gate, 0.0) * y_E[routing.expert]).sum()
    return y**2 + sum(weight * routing.losses[name][0] for name, weight in given.loss_weights.items())

  slope = jax.jit(jax.vmap(jax.grad(loss)), compiler_options=QUICK)
  for end in (-0.5, 0.5):
    steps = np.array([-1e-2, -1e-3, -1e-4, 0.0, 1e-4, 1e-2]) * np.sign(end)
    found = np.abs(slope(jnp.asarray(end + steps, jnp.float32)))
    assert (found[3:] == 0).all()
    # Inside, the slope falls linearly (times the entropy's log, ten to twenty here): 100 times over 100.
    assert found[0] > found[1] > found[2] and found[2] < 0.03 * found[0]


def test_static_gates_are_alike_and_do_not_look_at_tokens():
  """The same for all tokens, its entropy that of one token; each example has its own otherwise."""
  x_GTD = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, D)), jnp.float32)
  static, own = router(per_example=False), router()
  assert set(nnx.to_pure_dict(nnx.state(static))) == {"b_code", "b_select"}
  call = lambda given, x_GTD: jax.jit(given.__call__, compiler_options=QUICK)(
      x_GTD, Tokens(mask=MASK_GT[:, :x_GTD.shape[1]]), None)
  alike, one, different = call(static, x_GTD), call(static, x_GTD[:, :1]), call(own, x_GTD)
  assert not np.ptp(dense(alike, 8), axis=1).any() and np.ptp(dense(different, 8), axis=1).all()
  np.testing.assert_allclose(alike.losses["selection_entropy"][0] / T, one.losses["selection_entropy"][0],
                             rtol=1e-6)


def test_the_static_gates_entropy_weighs_what_it_does_in_the_authors_code():
  """A sum over the batch times 1e-6: one value for a static gate; as a mean, of 1,000 examples otherwise."""
  weight = lambda **fields: router(**fields).loss_weights["selection_entropy"]
  assert (weight(), weight(per_example=False)) == (1e-3, 1e-6)
  assert weight(per_example=False, entropy_weight=0.5) == 0.5


def test_first_weights():
  """z within gamma / 100, selectors within 0.05, both spread."""
  for gamma in (1.0, 10.0):
    given = router(64, k=8, gamma=gamma)
    for drawn, bound in ((given.w_code, gamma / 100), (given.b_code, gamma / 100), (given.w_select, 0.05)):
      assert 0.9 * bound < np.abs(drawn[...]).max() <= bound and np.abs(drawn[...].mean()) < 0.25 * bound


def test_first_choices_claim_before_second_ones():
  routing = route([[[[-1.0, -1, 0]], [[1.0, 0, -1]]]], E=8)  # experts 0, 1 and 4, 6: half each
  assert routing.token.tolist() == [[0, 1] * 8]
  assert routing.expert[0, :4].tolist() == [0, 4, 1, 6]
  assert routing.valid[0].tolist() == [True] * 4 + [False] * 12
  routing = route([[[[-0.1, -1, -1], [1.0, 1, 1]]]], [[[0.0, 3.0]]])
  assert routing.expert[0, :3].tolist() == [7, 0, 4]


@pytest.mark.parametrize("fields, message", [
    (dict(k=9), "router.k=9 is not between 1 and num_experts=8"),
    (dict(gamma=0.0), "router.gamma=0.0 is out of range; choose a number above 0"),
    (dict(gamma=float("nan")), "router.gamma=nan is out of range"),
    (dict(selectors=2), "router.selectors is set, but router.name='dselect_k' takes no such argument"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
