"""The control: routers as the seed draws them in a model that is trained otherwise."""

import jax
import numpy as np

from sparse_experts.analysis.untrained import untrained
from sparse_experts.config import seeds
from sparse_experts.models.names import by_path
from tests.analysis.tiny_run import tiny_run


def test_an_untrained_router_is_that_of_the_first_step():
  run = tiny_run(train__seed=3)
  model = run.abstract_model("train")
  first = by_path(jax.jit(lambda key: model.init(key)[0])(jax.random.key(seeds(run.config)["init"])))
  found, trained = untrained(run, -1), by_path(run.params)
  assert found.step == -1 and run.step == 0
  routers = {path for path in trained if "router" in path}
  assert len(routers) == 1 < len(trained)
  for path, x in by_path(found.params).items():
    expected = first if path in routers else trained
    np.testing.assert_allclose(x, expected[path], rtol=1e-6, err_msg="/".join(path))
