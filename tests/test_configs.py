"""Every file in configs/ promises what it should, builds, shrinks and takes a step."""

import math
import pathlib
import re

import jax
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.config import default_config, from_json, image_tokens, load_config, replaced, to_json
from sparse_experts.models import build
from sparse_experts.tasks import task_of
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.state import abstract_state, make_state
from sparse_experts.training.step import make_train_step
from sparse_experts.validation import validate
from tests.shrink import shrink

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.py"))
VARIANTS = re.compile(r"^VARIANTS = (.*)$", re.M)
SPECS = [spec for name in FILES for spec in (name, *(
    f"{name}:{variant}" for line in VARIANTS.findall((ROOT / name).read_text())
    for variant in re.findall(r'"(\w+)"', line)))]
WORDS = [{"text": b"def f(x):\n  return x + %d\n" % i * 20, "domain": 0} for i in range(8)]
IMAGES = [{"image": np.full((8, 8), 20 * i, np.uint8), "label": i % 3, "text": f"grey {i}"}
          for i in range(12)]


def load(spec):
  return load_config(str(ROOT / spec))


@pytest.mark.parametrize("name", FILES)
def test_docstring_promises(name):
  text = (ROOT / name).read_text()
  for word in ("Paper:", "Command:", "Hardware:", "Minutes:", "Expect:"):
    assert re.search(rf"^{word} +\S", text, re.M), f"{name} does not say its {word}"
  assert f"--config={name} " in text, f"{name} does not give its own command"


@pytest.mark.parametrize("spec", SPECS)
def test_builds(spec):
  config = load(spec)
  validate(config)
  model = build(config, vocab_size=384)
  assert bool(model.sparse_layers) == (config.model.num_experts > 0)
  assert from_json(to_json(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize("spec", SPECS)
def test_runs_on_eight_devices(spec):
  """A laptop's recipe has groups and rows for the 2x4 mesh of docs/first_run.md."""
  config = load(spec).unlock()
  config.mesh.update({"data": 2, "expert": 4})
  validate(config)


QUICK = ("configs/smoke.py",)


def step_cases():
  """Of configs that shrink to the same, the first. Most are slow: test_golden.py trains each family."""
  first = {}
  for spec in SPECS:
    first.setdefault(to_json(shrink(load(spec))), spec)
  return [pytest.param(spec, marks=[pytest.mark.slow] * (spec not in QUICK)) for spec in first.values()]


@pytest.mark.parametrize("spec", step_cases())
def test_takes_a_step(spec):
  config = shrink(load(spec))
  validate(config)
  task = task_of(config)
  source = task.as_source(WORDS if task.token_targets else IMAGES)
  tokenizer = task.make_vocabulary(source)
  records = task.make_dataset("train", tokenizer, source)
  batch = jax.tree.map(lambda *a: np.stack(a), *[records[i] for i in range(config.train.batch_size)])
  model = build(config, tokenizer.vocab_size)
  rule = make_optimizer(config, model.axes)
  mesh = partitioning.make_mesh()
  with partitioning.use(mesh):
    state = make_state(model, rule, 0, abstract_state(model, rule, mesh, fsdp=False))
    before = jax.device_get(state.params)
    step = jax.jit(make_train_step(model, rule, config))
    for _ in range(2):  # a vit's head starts at zero, which gives the rest no gradient in the first
      state, metrics = step(state, batch, jax.random.key(0))
  loss, weight = jax.device_get(metrics["loss"])
  assert weight > 0
  assert math.isfinite(loss / weight)
  moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, jax.device_get(state.params))
  still = [jax.tree_util.keystr(path) for path, m in jax.tree_util.tree_leaves_with_path(moved) if not m]
  assert not still, f"parameters without an update: {still}"


def test_the_group_size_of_a_folder_follows_its_images():
  """Groups of 8 images whose patches the command line sets, with a class token each."""
  for size, patch in ((64, 8), (32, 8), (96, 16)):
    config = replaced(load("configs/v_moe/folder.py"), {"data.image.size": size, "model.patch_size": patch})
    assert config.model.group_size == 8 * image_tokens(config)
    validate(from_json(to_json(config)))


def test_the_default_config_is_valid():
  validate(default_config())
