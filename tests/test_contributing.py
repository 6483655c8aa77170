"""The router that CONTRIBUTING.md walks through runs as printed."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_experts.moe import Experts, MoELayer, Router, Routing, Tokens
from sparse_experts.moe.routing.router import router_metrics


def test_the_router_of_the_walk():
  text = (pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  names = {"jax": jax, "jnp": jnp, "nnx": nnx, "Router": Router, "Routing": Routing,
           "router_metrics": router_metrics}
  exec(code, names)
  rngs = nnx.Rngs(0)
  layer = MoELayer(names["ModuloRouter"](4, 3, rngs=rngs), Experts(3, 4, 8, "relu", rngs=rngs), group_size=6)
  id_GT = jnp.array([[1, 2, 3], [1, 2, 0]], jnp.int32)
  x_GTD = jnp.ones((2, 3, 4))
  y_GTD, routing = layer(x_GTD, Tokens(mask=id_GT > 0, id=id_GT))
  np.testing.assert_array_equal(y_GTD[0, :2], y_GTD[1, :2])  # a token's expert depends on its id alone
  assert not y_GTD[1, 2].any()
  assert routing.metrics["load"][0].sum() == 5
