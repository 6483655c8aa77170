"""A stack of blocks, trained on a stream and tuned on a new task: what moves, and what it starts from."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments.testbed import deep
from experiments.testbed.measure import text
from sparse_experts.errors import UserError

ARM = {"blocks": "ds", "router": "top_k", "rate": 0.01, "experts": 4, "expert_dim": 8, "groups": 1}
SHORT = {"examples": 3, "steps": 4, "groups": 2}


def moved(arm):
  """Names of the parameters that training, or tuning where the arm has it, has changed."""
  program = deep._program(text(arm), True)
  before = flatten_dict(program._start(0)[0], sep="/")
  after = flatten_dict(program.trained(program.given["rate"], 0)[0], sep="/")
  return {name for name in before if not np.array_equal(before[name], after[name])}, set(before)


@pytest.mark.parametrize("only, is_moved", [
    ("all", lambda name: True), ("experts", lambda name: name.startswith("sparse_1/")),
    ("others", lambda name: not name.startswith("sparse_1/"))])
def test_tuning_moves_only_its_part(only, is_moved):
  found, names = moved(ARM | {"tune": SHORT | {"only": only}})
  assert found == set(filter(is_moved, names))


def test_what_is_frozen_stays_as_it_starts():
  found, names = moved(ARM | {"frozen": ["sparse_1/router"]})
  assert names - found == {"sparse_1/router/w"}


def test_tuning_starts_from_the_trained_parameters_on_few_examples_of_the_new_task():
  first, tuned = (deep._program(text(ARM | {"tune": tune}), True) for tune in (None, SHORT))
  params, _, world, batches, _ = tuned._start(0)
  jax.tree.map(np.testing.assert_array_equal, params, first.trained(first.given["rate"], 0)[0])
  upstream = first._start(0)[2]
  name_NL = np.asarray(world.name_NL)
  assert (name_NL == name_NL[:1]).all(), "the same names in all styles"
  assert not np.array_equal(name_NL, upstream.name_NL)
  assert np.array_equal(world.paper_ND, upstream.paper_ND), "the same images"
  groups = {row.tobytes() for step in np.asarray(batches.tokens.id) for row in step}
  assert len(groups) == SHORT["examples"] and batches.target_GT.shape[:2] == (4, 2)


def test_updates_are_clipped_by_their_root_mean_square():
  program = deep._program(text(ARM | {"update_clip": 0.5}), True)
  large, small = program._moved({"a": {"b": np.full((2, 3), 4.0)}, "c": np.full(3, 0.25)}).values()
  np.testing.assert_allclose(large["b"], 0.5)
  np.testing.assert_allclose(small, 0.25)


def test_the_loss_at_equal_upstream_loss_is_read_between_the_rungs(monkeypatch):
  losses = {2: (1.2, 2.4), 4: (0.8, 2.0), 8: (1.0, 2.5)}  # of a width: upstream, after tuning
  of_arm = lambda arm, seed, quick: losses[arm["expert_dim"]][arm["tune"] is not None]
  monkeypatch.setattr(deep, "loss", of_arm)
  of = lambda ladder: deep.at_equal_upstream_loss(ARM | {"tune": SHORT, "ladder": ladder}, 0, False)
  assert of([2, 4]) == pytest.approx(2.5 - 2.2)
  assert of([4, 4]) is None, "no rung above it"
  assert deep.at_equal_upstream_loss(ARM, 0, False) == 0


@pytest.mark.parametrize("change, told", [
    ({"blocks": "dx"}, "blocks='dx': a letter per block"), ({"width": 3}, r"an arm has \['width'\]; known: "),
    ({"tune": {"step": 3}}, r"an arm's tune has \['step'\]"),
    ({"tune": {}, "stream": "facts"}, "only composites have a new task"),
    ({"stream": "fact"}, "stream='fact' is unknown; did you mean 'facts'?")])
def test_a_wrong_arm_is_refused(change, told):
  with pytest.raises(UserError, match=told):
    deep._program(text(ARM | change), True)
