"""Steps as `train` makes them, and how long a run takes to begin."""

import json

import jax
import numpy as np
import pytest

from sparse_experts.benchmark import startup, step
from sparse_experts.errors import UserError
from tests.texts import write_texts
from tests.training.test_measures import undefined
from tests.training.tiny import documents, tiny_config, tiny_train


@pytest.mark.slow
def test_a_step_is_the_step_of_train(tmp_path):
  """The first one gives the loss that a run logs for its first step; the next ones go on from it."""
  run = tiny_train(tmp_path / "run", train__steps=1, train__eval_every=100, eval__train_windows=8,
                   eval__min_bytes=100)
  steps = step.Steps(tiny_config(), str(tmp_path / "steps"), documents())
  first = steps()
  logged = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
  assert first["loss"][0] / first["loss"][1] == pytest.approx(logged["loss"], rel=1e-6)
  for ours, theirs in zip(jax.tree.leaves(steps._state.params), jax.tree.leaves(run.params), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  second = steps()
  assert second["loss"][0] < first["loss"][0]
  assert int(steps._state.step) == 2


@pytest.mark.slow
def test_a_step_against_its_dense_twin():
  found = step.measure(tiny_config(), 2, documents())
  assert found["tokens"] == 8 * 32
  assert not undefined(set(found) - {"tokens", "runs"})
  assert found["step_over_dense"] > 0 and found["dense_step_ms"] > 0


@pytest.mark.slow
def test_compile_time_against_depth():
  """Depth 4 and 8: what is compiled is the same, as layers are stacked and scanned."""
  before = jax.config.jax_enable_compilation_cache
  found = startup.compile_growth(tiny_config(), (4, 8), documents())
  assert jax.config.jax_enable_compilation_cache == before
  assert found["compile_layers"] == [4, 8] and not undefined(set(found) - {"compile_layers"})
  assert found["compile_growth"] < 2  # on a busy machine; unrolled it would be 2


@pytest.mark.slow
def test_time_to_the_first_step(tmp_path):
  """Of processes of their own; the second finds the programs of the first."""
  from tests.cli.conftest import CONFIG

  write_texts(tmp_path / "text", documents())
  (tmp_path / "tiny.py").write_text(CONFIG.format(source=f"files:{tmp_path}/text"))
  found = startup.first_steps([f"--config={tmp_path}/tiny.py:configs/smoke.py"])
  assert not undefined(found)
  assert 0 < found["first_step_warm_seconds"] < found["first_step_cold_seconds"]
  with pytest.raises(UserError, match="made no step: error: "):
    startup.first_step(["--config=configs/smoke.py", "--config.train.steps=-1"], str(tmp_path))
