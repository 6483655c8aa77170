"""A router that breaks a promise is named, in one line; test_every_router.py tries the package's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, MoELayer, Router, Routing, TopKRouter, check_router
from sparse_experts.moe.routing.router import router_metrics

D, E = 6, 4


class ByExperts(Router):
  """Expert choice: a list of E * C assignments that are not T * K, some of padding and not valid."""

  def __init__(self):
    self.num_experts = E
    self.w = nnx.Param(jax.random.normal(jax.random.key(0), (D, E)))

  def __call__(self, x_GTD, tokens, capacity, key=None):
    G, T, _ = x_GTD.shape
    C = capacity or T // E
    prob_GTE = jax.nn.softmax(x_GTD @ self.w[...], axis=-1)
    order_GTE = jnp.argsort(-jnp.where(tokens.mask[..., None], prob_GTE, -1.0), axis=1)
    token_GCE = order_GTE[:, :C].astype(jnp.int32)
    gate_GCE = jnp.take_along_axis(prob_GTE, token_GCE, axis=1)
    flat = lambda a: jnp.broadcast_to(a, token_GCE.shape).reshape(G, C * E)
    token_GA, expert_GA = flat(token_GCE), flat(jnp.arange(E, dtype=jnp.int32)[None, None])
    valid_GA = jnp.take_along_axis(tokens.mask, token_GA, axis=1)
    return Routing(token_GA, expert_GA, flat(gate_GCE), valid_GA, metrics=router_metrics(
        expert_GA, valid_GA, prob_GTE, tokens.mask, E))


def test_any_list_passes_not_only_token_choice():
  check_router(ByExperts(), D)
  router = ByExperts()
  router.causality = "self"
  with pytest.raises(UserError, match="ByExperts: causality='self', but a token's routing depends on other "
                                      "tokens of its group; declare what it depends on: past, sequence, ba"):
    check_router(router, D)


class Mine(TopKRouter):
  """Top-2, changed: `change(routing, x_GTD, tokens, key)`."""

  change = staticmethod(lambda routing, x_GTD, tokens, key: routing)

  def __init__(self, change=None):
    super().__init__(D, E, 2, rngs=nnx.Rngs(0))
    if change is not None:
      self.change = change

  def __call__(self, x_GTD, tokens, capacity, key=None):
    return self.change(super().__call__(x_GTD, tokens, capacity, key), x_GTD, tokens, key)


def changed(**fields):
  """A router whose routing has other fields; a function gets the old one."""
  new = lambda r: {name: value(getattr(r, name)) for name, value in fields.items()}
  return Mine(lambda r, *_: r.replace(**new(r)))


def with_fields(**fields):
  router = Mine()
  for name, value in fields.items():
    setattr(router, name, value)
  return router


def earlier_or_later(reverse):
  """Gates times the running mean of what comes before (or after) each token."""

  def change(r, x_GTD, tokens, key):
    mean_GT = jnp.cumsum(x_GTD.mean(-1), axis=1)
    mean_GT = mean_GT[:, -1:] - mean_GT if reverse else mean_GT
    return r.replace(gate=r.gate * jnp.tanh(jnp.take_along_axis(mean_GT, r.token, axis=1)))

  return change


def of_all_groups(r, x_GTD, tokens, key):
  return r.replace(gate=r.gate * jnp.tanh(x_GTD.sum()))


def of_the_clock(r, x_GTD, tokens, key):
  return r.replace(gate=r.gate * np.float32(np.random.default_rng().uniform(1, 2)))


def noisy_out_of_range(r, x_GTD, tokens, key):
  return r if key is None else r.replace(expert=r.expert + jax.random.randint(key, r.expert.shape, 0, 2))


class WithState(Mine):

  def __init__(self, mutates):
    super().__init__()
    self.count, self.mutates = nnx.Variable(jnp.zeros(E)), mutates

  def __call__(self, *args):
    if self.mutates:
      self.count[...] += 1.0
    return super().__call__(*args)

  def next_state(self, state, params, metrics, stats):
    return {"count": metrics["load"]}


TABLE = [
    (changed(gate=lambda a: a[:, 1:]), r"gate has shape \(4, 31\), but token has \(4, 32\); token, expert"),
    (changed(token=lambda a: a[0]), r"token has shape \(32,\), but there are 4 groups; give \[G, A\]"),
    (changed(gate=lambda a: a.astype(jnp.bfloat16)), "gate is bfloat16; give float32"),
    (changed(expert=lambda a: a.astype(jnp.float32)), "expert is float32; give int32"),
    (changed(valid=lambda a: a.astype(jnp.int32)), "valid is int32; give bool"),
    (changed(gate=lambda a: None), r"gate is NoneType; give an array \[G, A\]"),
    (Mine(lambda r, *_: (r.expert, r.gate)), "it returned tuple; return a Routing"),
    (changed(rows_per_token=lambda k: 1), r"rows_per_token=1 promises 16 x 1 = 16 assignments per gr"),
    (changed(token=lambda a: jnp.zeros_like(a), valid=lambda a: jnp.zeros_like(a)),
     "rows_per_token=2, but a token is listed 32 times; leave it None"),
    (changed(gate=lambda a: a.at[0, 3].set(jnp.nan)), "a gate is nan; gates are finite numbers"),
    (changed(gate=lambda a: a.at[0, 3].set(jnp.inf)), "a gate is inf; gates are finite"),
    (changed(expert=lambda a: a.at[0, 3].set(E)), "expert 4 is listed, of 4; experts are 0 to 3"),
    (changed(expert=lambda a: a.at[0, 3].set(-1)), "expert -1 is listed"),
    (changed(token=lambda a: a.at[0, 3].set(16)), "token 16 is listed in a group of 16; tokens are 0 to 15"),
    (changed(expert=lambda a: jnp.zeros_like(a)), "token 0 is sent to expert 0 twice; list a pair once"),
    (changed(valid=lambda a: jnp.ones_like(a)), r"token \d+ is padding and listed as valid; set valid to"),
    (changed(losses=lambda p: {"load_balance": p["load_balance"][0], "z": p["z"]}),
     r"losses\['load_balance'\] is no pair of arrays; give \(sum, count\)"),
    (changed(losses=lambda p: p | {"z": (jnp.zeros(4), jnp.ones(4))}),
     r"losses\['z'\] has shapes \(4,\) and \(4,\); give a sum of shape \(\) over all groups and a count"),
    (changed(losses=lambda p: {"balance": p["load_balance"]}), "loss_weights has 'load_balance', but losses "
     "do not; did you mean 'balance'.*; return that loss, or drop its weight"),
    (changed(losses=lambda p: p | {"z": (p["z"][0] / 0.0, p["z"][1])}), r"losses\['z'\] is not finite"),
    (changed(metrics=lambda p: {"entropy": p["entropy"]}), "metrics lack 'load', .* take metrics from route"),
    (changed(metrics=lambda p: p | {"load": (p["load"][0].sum(), p["load"][1])}),
     r"metrics\['load'\] has shapes \(\) and \(\); give a sum of shape \(4,\)"),
    (Mine(of_the_clock), "two calls on the same tokens without a key differ; draw from `key` only"),
    (Mine(lambda r, x, *_: r.replace(gate=r.gate + jnp.sqrt(x - x).sum())),
     "gradients of gates or losses in its input are not finite; avoid"),
    (Mine(earlier_or_later(False)), "causality='self', but a token's routing depends on other tokens of its"),
    (with_fields(causality="past", change=earlier_or_later(True)),
     "causality='past', but a token's routing depends on later tokens of its .*: sequence, batch"),
    (with_fields(causality="sequence", change=earlier_or_later(False)),
     "causality='sequence', but .* on other sequences of its group; declare what it depends on: batch"),
    (with_fields(causality="batch", change=of_all_groups), "the routing of a group depends on other groups"),
    (with_fields(causality="future"), "causality='future' is unknown; known: batch, past, self, sequence"),
    (with_fields(k=0.5), "k is 0.5; set self.k to a whole number in __init__"),
    (Mine(noisy_out_of_range), "expert 4 is listed, of 4"),
    (WithState(mutates=True), "it changes a variable while routing; change state in next_state"),
    (WithState(mutates=False), r"next_state turns .* into .*; keep names, shapes and types"),
]


@pytest.mark.parametrize("router, line", TABLE, ids=[line[:40] for _, line in TABLE])
def test_a_router_that_breaks_a_promise_is_named(router, line):
  with pytest.raises(UserError, match=f"^router {type(router).__name__}: {line}") as caught:
    check_router(router, D)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("router", [
    Mine(), with_fields(causality="past", change=earlier_or_later(False)),
    with_fields(causality="batch", change=earlier_or_later(True))], ids=["self", "past", "batch"])
def test_what_is_declared_may_be_used(router):
  check_router(router, D)


def test_a_router_that_raises_is_named_with_its_line():
  router = Mine(lambda r, x_GTD, *_: r.replace(gate=x_GTD @ jnp.ones((D + 1, 2))))
  line = r"^.*test_check.py:\d+: router Mine, on vectors of width 6, raised TypeError: dot_general requires"
  with pytest.raises(UserError, match=line):
    check_router(router, D)


def test_no_router():
  with pytest.raises(UserError, match="^router 3 is no Router; give an instance of a subclass of sparse_exp"):
    check_router(3, D)


def test_a_layer_names_the_router_too():
  layer = lambda x: MoELayer(TABLE[0][0], Experts(E, D, 8, "relu", rngs=nnx.Rngs(0)))(x)[0]
  with pytest.raises(UserError, match=r"router Mine: gate has shape \(2, 9\), but token has \(2, 10\)"):
    jax.eval_shape(layer, jnp.ones((2, 5, D)))
