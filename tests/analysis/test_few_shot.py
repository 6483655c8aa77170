"""Few-shot linear evaluation: the ridge in closed form, who is drawn, and what is chosen on what."""

import types

import numpy as np
import pytest

from sparse_experts.analysis import few_shot as fs
from sparse_experts.config import default_config
from sparse_experts.data import Source
from sparse_experts.errors import UserError


def clouds(each, d=6, classes=3, noise=1.0, seed=0):
  """Gaussian clouds of `each` points around a centre per class."""
  rng = np.random.default_rng(seed)
  centre_CD = np.random.default_rng(9).normal(size=(classes, d)) * 2
  label = np.repeat(np.arange(classes), each)
  return centre_CD[label] + noise * rng.normal(size=(len(label), d)), label


@pytest.mark.parametrize("each", [2, 9], ids=["fewer images than features", "more"])
def test_guesses_are_those_of_the_normal_equations(each):
  x_ND, y_N = clouds(each, noise=3.0)
  test_MD, _ = clouds(20, noise=3.0, seed=1)
  for log2, got in zip((-3, 4, 12), fs.guesses(x_ND, y_N, test_MD, (-3, 4, 12))):
    x, test = ((a - x_ND.mean(0)) / (x_ND.std(0) + 1e-5) for a in (x_ND, test_MD))
    x, test = (np.concatenate([a, np.full((len(a), 1), 100.0)], 1) for a in (x, test))
    target = np.where(y_N[:, None] == np.arange(3), 1.0, -1.0)
    w = np.linalg.solve(x.T @ x + 2.0**log2 * np.eye(x.shape[1]), x.T @ target)
    np.testing.assert_array_equal(got, (test @ w).argmax(1))


def test_a_ridge_is_chosen_that_helps():
  """More features than images and much noise: none is too little, and too much leaves the bias alone."""
  x_ND, y_N = clouds(10, d=40, noise=4.0)
  rank_N = np.tile(np.arange(10), 3)
  chosen = fs.choose(x_ND, y_N, rank_N)
  assert chosen in fs.LOG2_RIDGES
  test_MD, truth_M = clouds(300, d=40, noise=4.0, seed=1)
  right = [float((g == truth_M).mean()) for g in fs.guesses(x_ND, y_N, test_MD, fs.LOG2_RIDGES)]
  assert right[fs.LOG2_RIDGES.index(chosen)] > max(right) - 0.05


@pytest.fixture
def source():
  image = lambda label, i: {"image": np.zeros((2, 2), np.uint8), "label": label, "name": f"{label}/{i}"}
  train = [image(i % 3, i) for i in range(15)] + [image(0, 99)]
  return Source(train, [image(i % 3, i) for i in range(30)], ("a", "b", "c"), "")


def test_more_shots_hold_fewer_ones_and_tell_more(source):
  """Features are stood in for by the clouds; which images were asked for is written down."""
  asked = []

  def look(images):
    asked.append([image["name"] for image in images])
    labels = np.array([image["label"] for image in images])
    x, of = clouds(len(images), noise=1.5, seed=len(images))
    taken = {label: iter(x[of == label]) for label in range(3)}
    return np.stack([next(taken[label]) for label in labels])

  found = fs.few_shot(look, source, [5, 1])
  assert list(found) == [f"few_shot/{n}/{k}" for n in (1, 5) for k in ("accuracy", "log2_ridge")]
  assert found["few_shot/5/accuracy"] >= found["few_shot/1/accuracy"] > 1 / 3
  assert found["few_shot/1/log2_ridge"] == found["few_shot/5/log2_ridge"]
  assert len(asked[0]) == 15 and len(asked[1]) == 30
  assert fs.few_shot(look, source, [5, 1]) == found
  fs.few_shot(look, source, [5], seed=1)
  assert asked[4] != asked[0]


@pytest.mark.parametrize("shots, message", [
    ([1, 6], "6 shots: class 'b' has 5 training images; ask for 5 or fewer"),
    ([1], "1 shot alone cannot choose the ridge; ask for more shots too, such as 1,5")])
def test_too_few_images(source, shots, message):
  with pytest.raises(UserError, match=f"^{message}$"):
    fs.few_shot(None, source, shots)


def test_a_model_of_text_has_none():
  run = types.SimpleNamespace(config=default_config())
  with pytest.raises(UserError, match="few-shot evaluation is of images; .*"):
    fs.features(run, [])
