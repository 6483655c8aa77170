"""What routing refuses, in one line with the way out, and what it must bear: one table of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Experts, MoELayer, Tokens, expert_capacity, make_layer, make_router

D, F = 6, 5


def router(name, num_experts=4, **arguments):
  return make_router(name, D, num_experts, rngs=nnx.Rngs(params=0), **arguments)


def layer(name, num_experts=4, factor=None, **arguments):
  experts = Experts(num_experts, D, F, rngs=nnx.Rngs(1))
  return MoELayer(router(name, num_experts, **arguments), experts, capacity_factor=factor)


def call(name, tokens=None, shape=(2, 8), key=None, **arguments):
  made = layer(name, **arguments)
  return jax.jit(lambda x_GTD: made(x_GTD, tokens, key))(jax.random.normal(jax.random.key(0), (*shape, D)))


INPUT = {"routed": lambda: layer("top_k"),
         "mixed": lambda: make_layer("soft_moe", D, Experts(4, D, F, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))}
REFUSED = [
    (lambda: router("top_k", k=0), "router.k=0 is not between 1 and num_experts=4; lower k or add experts"),
    (lambda: router("top_k", k=5), "router.k=5 is not between 1 and num_experts=4; lower k or add experts"),
    (lambda: router("v_moe", 2, k=3), "router.k=3 is not between 1 and num_experts=2; lower k or add experts"),
    (lambda: router("hierarchical", k=6, branches=2), "router.k=6 does not take 1 to 2 experts from each"),
    (lambda: router("dynmoe", initial_experts=5), "router.initial_experts=5 is not between 1 and num_experts=4"),
    (lambda: call("hash"), "router 'hash' needs token ids, but tokens.id is None; give the layer Tokens"),
    (lambda: call("task"), "router 'task' needs tokens.task, which is None; give batches a 'domain'"),
    (lambda: call("random", draw="sequence", key=jax.random.key(0)), "tokens.sequence is None; give the layer"),
    (lambda: router("deepseek_v3", 8, nodes=3), "router.nodes=3 does not divide num_experts=8 into nodes of 2"),
    (lambda: router("deepseek_v3", 8, nodes=4, nodes_per_token=5), "is not between 1 and router.nodes=4"),
    (lambda: router("top_k", k=1.5), "router.k=1.5 is no int, which router.name='top_k' takes there; give one"),
    (lambda: router("cosine", dim=1.5), "router.dim=1.5 is no int, which router.name='cosine' takes there"),
    (lambda: router("random", draw=2), "router.draw=2 is no str, which router.name='random' takes there"),
    (lambda: make_layer("soft_moe", D, Experts(4, D, F, rngs=nnx.Rngs(0)), slots="two", rngs=nnx.Rngs(1)),
     "router.slots='two' is no int, which router.name='soft_moe' takes there; give one"),
    (lambda: expert_capacity("mesh", 8, 4, 1, 0.0), "capacity_factor=0.0 leaves no slots; give a positive"),
    (lambda: MoELayer(router("top_k"), Experts(3, D, F, rngs=nnx.Rngs(0))),
     "the router has 4 experts but there are 3"),
    # What is no input of a layer, with and without a router.
    *((lambda x=x, tokens=tokens, name=name: INPUT[name]()(x, tokens), message) for x, tokens, message in (
        (jnp.ones((2, 8, D)), jnp.ones((2, 8), bool), "not Tokens; for a mask give Tokens(mask=...)"),
        (jnp.ones((2, 8, D)), Tokens(mask=jnp.ones((2, 7), bool)), "tokens.mask has shape (2, 7), but x has 2 rows"),
        (jnp.ones((2, 8, D)), Tokens(id=jnp.ones(8, int)), "tokens.id has shape (8,), but x has 2 rows of 8"),
        (jnp.ones((2, 8, D)), Tokens(mask=jnp.ones((2, 8))), "tokens.mask is of type float32; give True where"),
        (jnp.ones((8, D)), None, f"x has shape (8, {D}), but the layer takes [rows, tokens, {D}]; for one row give x[N"),
        (jnp.ones((2, 8, D + 1)), None, f"the layer takes [rows, tokens, {D}]; give vectors of that width"),
    ) for name in ("routed", "mixed")),
]


@pytest.mark.parametrize("mistake, message", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_is_named(mistake, message):
  with pytest.raises(UserError) as error:
    mistake()
  assert message in str(error.value) and "\n" not in str(error.value)


# What is odd but no mistake: every group that is padding, one expert, fewer tokens than experts, hardly a slot.
# (tests/moe/test_every_router.py has these for every router; here is what comes out.)
BORNE = {
    "padding alone": (dict(tokens=Tokens(mask=jnp.zeros((2, 8), bool))), lambda y, r: not y.any()),
    "one expert": (dict(num_experts=1), lambda y, r: r.gate.min() == 1 and r.metrics["dropped"][0] == 0),
    "fewer tokens than experts": (dict(shape=(2, 2)), lambda y, r: r.metrics["load"][0].sum() == 4),
    "hardly a slot": (dict(factor=1e-6), lambda y, r: r.kept.sum(1).max() <= 4 * 4),
}


@pytest.mark.parametrize("given, holds", BORNE.values(), ids=BORNE)
def test_odd_sizes_are_borne(given, holds):
  y, routing = call("top_k", **given)
  assert np.isfinite(y).all() and holds(np.asarray(y), routing)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves((routing.losses, routing.metrics)))
