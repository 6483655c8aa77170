"""A model that memory cannot hold is refused before it is built."""

import re
import resource

import jax
import pytest

from sparse_experts import host_memory, partitioning
from sparse_experts.config import replaced
from sparse_experts.errors import UserError
from sparse_experts.models import build
from sparse_experts.training import memory
from sparse_experts.training.loop import train
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.state import abstract_state
from tests.training.tiny import documents, tiny_config

KEYS = {"model.embed_dim": 2**20, "model.mlp_dim": 2**12}


def check(config, data=1):
  model = build(config, 384, "train")
  mesh = partitioning.make_mesh(data, 1, 1)
  abstract = abstract_state(model, make_optimizer(config, model.axes), mesh, False)
  memory.check_training(config, model, abstract, {"encoder": 0, "targets": config.data.length})
  return abstract


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_built(tmp_path, monkeypatch):
  monkeypatch.setattr(host_memory, "limit", lambda: 24 * 2**30)
  expected = (r"^training needs [\d.]+ TiB or more \(parameters .*, gradients .*, optimizer .*, activ.*\), "
              r"but this process may have 24.0 GiB; .* or set train.memory=\d+ if the memory is there$")
  with pytest.raises(UserError, match=expected):
    train(replaced(tiny_config(), KEYS), str(tmp_path / "run"), data=documents())
  assert not (tmp_path / "run" / "config.json").exists()


def test_what_is_counted():
  """Parameters, gradients, two moments, and for each of two layers the 8 x 32 rows of 16 numbers."""
  config = replaced(tiny_config(), {"train.memory": 0.0})
  with pytest.raises(UserError) as e:
    check(config)
  model = build(config, 384, "train")
  params = 4 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))[0]))
  said = dict(re.findall(r"(\w+) ([\d.]+ \w+)", re.search(r"\((.*)\)", str(e.value)).group(1)))
  assert said["parameters"] == said["gradients"] == host_memory.words(params)
  assert said["optimizer"] == host_memory.words(2 * params + 4)  # and its count
  assert said["activations"] == host_memory.words(2 * 8 * 32 * 16 * 4)


@pytest.mark.parametrize("keys, grown", [
    ({"model.dispatch": "scatter", "model.capacity_factor": 1e6}, "activations"),
    ({"model.num_experts": 10**8}, "parameters"), ({"model.mlp_dim": 2**31 - 1}, "optimizer"),
    ({"train.batch_size": 2**20, "data.length": 2**20, "model.group_size": 2**20}, "activations"),
    ({"model.dispatch": "einsum", "model.min_capacity": 2**31 - 1}, "activations")])
def test_what_grows_is_named_with_its_size(keys, grown, monkeypatch):
  monkeypatch.setattr(host_memory, "limit", lambda: 2**30)
  with pytest.raises(UserError, match=rf"{grown} [\d.]+ (GiB|TiB|PiB).*may have 1.0 GiB"):
    check(replaced(tiny_config(), keys))


def test_the_user_says_how_much_there_is(monkeypatch):
  monkeypatch.setattr(host_memory, "limit", lambda: 1000)
  check(replaced(tiny_config(), {"train.memory": 1.0}))
  with pytest.raises(UserError, match=r"but train\.memory allows 1.0 KiB"):
    check(replaced(tiny_config(), {"train.memory": 2.0**-20}))
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  check(tiny_config())  # an accelerator says itself that it is full


def test_copies_on_devices_of_this_process_count(monkeypatch):
  """Eight devices of one process each hold the parameters; the batch is there once."""
  needs = []
  for data in (1, 8):
    with pytest.raises(UserError) as e:
      check(replaced(tiny_config(), {"train.memory": 0.0, "mesh.data": data}), data)
    needs.append([float(n) for n in re.findall(r"(?:parameters|activations) ([\d.]+) \w+", str(e.value))])
  (one, rows), (eight, same) = needs
  assert eight == pytest.approx(8 * one, rel=0.01) and rows == same  # of one decimal


@pytest.mark.parametrize("files, rlimit, expected", [
    ({}, resource.RLIM_INFINITY, None), ({}, 10**6, 10**6),
    ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/memory.max": "5000\n",
      "/sys/fs/cgroup/a/b/memory.max": "max\n"}, 10**6, 5000),
    ({"/sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n"}, resource.RLIM_INFINITY, 7000),
    ({"/sys/fs/cgroup/memory.max": "nonsense"}, 10**6, 10**6)])
def test_the_least_limit_counts(files, rlimit, expected, monkeypatch):
  monkeypatch.setattr(host_memory, "_read", lambda path: files.get(path, ""))
  monkeypatch.setattr(resource, "getrlimit", lambda which: (rlimit, rlimit))
  assert host_memory.limit() == expected or (expected is None and host_memory.limit() > 2**28)


def test_sizes_in_words():
  assert [host_memory.words(n) for n in (0, 1023, 1024, 24 * 2**30, 3.5 * 2**50, 2**80)] == [
      "0 bytes", "1,023 bytes", "1.0 KiB", "24.0 GiB", "3.5 PiB", "1,048,576.0 EiB"]
