"""The router that CONTRIBUTING.md walks through runs as printed."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.moe import DISPATCHES, Experts, MoELayer, Tokens, check_router

TEXT = (pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


@pytest.fixture(autouse=True)
def strict():
  """As around the tests of `moe/`."""
  with jax.numpy_dtype_promotion("strict"):
    yield


def printed(path):
  """The names that the file printed under this path defines, its imports included."""
  (code,) = re.findall(rf"```python\n# {path}\n(.*?)```", TEXT, re.DOTALL)
  names = {}
  exec(code, names)
  return names


@pytest.mark.slow
def test_the_router_of_the_walk():
  made = printed("sparse_experts/moe/routers/temperature.py")["TemperatureRouter"]
  routers = [made(4, 3, 2, temperature=t, rngs=nnx.Rngs(params=0)) for t in (0.01, 100.0)]
  for router in routers:
    check_router(router, 4)
  x_GTD = jax.random.normal(jax.random.key(1), (2, 6, 4))
  mask_GT = jnp.arange(12).reshape(2, 6) < 9
  experts = Experts(3, 4, 8, "relu", rngs=nnx.Rngs(0))
  outputs = {name: MoELayer(routers[0], experts, name)(x_GTD, Tokens(mask=mask_GT)) for name in DISPATCHES}
  for y_GTD, routing in outputs.values():
    np.testing.assert_allclose(y_GTD, outputs["ragged"][0], atol=1e-6)  # sums of two float32 rows
    assert not y_GTD[1, 3:].any() and routing.metrics["load"][0].sum() == 18
  sharp, flat = (router(x_GTD, Tokens(mask=mask_GT), None).metrics["confidence"][0] / 9 for router in routers)
  assert sharp > flat + 0.1 and abs(flat - 1 / 3) < 1e-3
