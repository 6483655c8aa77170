"""Routers whose gates are constant say so: the task's loss has no gradient for their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.moe.registry import make_router
from sparse_experts.moe.routing import Tokens

D, E = 4, 4
X_GTD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, D)), jnp.float32)
TOKENS = Tokens(mask=jnp.ones((1, 8), bool), task=jnp.arange(8)[None] // 4)
# {router: arguments with which each token has one expert}; others have no such setting.
ONE = {
    "top_k": dict(k=1), "cosine": dict(k=1), "v_moe": dict(k=1), "limoe": dict(k=1), "noisy_top_k": dict(k=1),
    "deepseek_v3": dict(k=1), "deepseek_moe": dict(k=1), "no_token_left_behind": {}, "comet": dict(k=1),
    "dselect_k": dict(k=1), "hierarchical": dict(k=1, branches=2, branches_per_token=1),
    "top_p": dict(threshold=0.0),
    "sparse_mixer": dict(k=1, eps=0.5),
    "sigma_moe": dict(k=1),
    "quantile": dict(k=1),
    "token_rounding": dict(k=1, tile=2),
    "simbal": dict(k=1),
    "base": {}, "sinkhorn": {}, "expert_choice": dict(k=1), "permuted": dict(of="noisy_top_k", k=1)}
# Noise is learnt with noise, a permutation while it is soft, selectors are weighed if there are several.
UNSEEN = ("noise", "logit_EE", "select")
CASES = [*ONE.items(), ("top_k", dict(k=1, gate="renormalized")), ("top_k", dict(k=2, gate="renormalized")),
         ("top_k", dict(k=1, gate="renormalized_after_drops")), ("cosine", dict(k=1, gate="renormalized")),
         ("cosine", dict(k=1, gate="renormalized", gate_function="sigmoid")), ("permuted", dict(k=1)),
         ("noisy_top_k", dict(k=2)), ("deepseek_v3", dict(k=2)),
         ("hierarchical", dict(k=2, branches=2, branches_per_token=2)),
         ("hierarchical", dict(k=2, branches=2, branches_per_token=1)),
         ("hierarchical", dict(k=4, branches=2))]


@pytest.mark.parametrize("name, arguments", [
    pytest.param(name, arguments, marks=[pytest.mark.slow] * (name in ("comet", "dselect_k", "hierarchical")))
    for name, arguments in CASES], ids=str)
def test_a_router_says_that_its_gates_are_constant(name, arguments):
  """It says so if and only if one of its parameters gets none."""
  router = make_router(name, D, E, rngs=nnx.Rngs(0), **arguments)
  graph, params, rest = nnx.split(router, nnx.Param, ...)
  # Parameters that start at 0 would leave every gate equal; others too few gates apart.
  params = jax.tree.map(lambda x: x + jnp.asarray(np.random.default_rng(1).normal(size=x.shape)), params)
  sign_GA1 = jnp.asarray(np.random.default_rng(2).normal(size=(1, 8, E)), jnp.float32)

  def score(params):
    routing = nnx.merge(graph, params, rest)(X_GTD, TOKENS, None)
    return jnp.where(routing.valid, routing.gate * sign_GA1[0, routing.token, routing.expert], 0.0).sum()

  gradient = nnx.to_pure_dict(jax.grad(score)(params))
  scores = {path: np.abs(x).max() for path, x in jax.tree_util.tree_leaves_with_path(gradient)
            if not any(part in str(path) for part in UNSEEN)}
  assert bool(router.no_gradient) == any(x < 1e-6 for x in scores.values()), scores
