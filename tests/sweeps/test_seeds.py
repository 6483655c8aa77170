"""Seeds trained as one program against the same seeds trained alone."""

import json
import re

import jax
import numpy as np
import pytest

from sparse_experts.errors import Stopped
from sparse_experts.sweeps import seeds
from sparse_experts.sweeps.cache import Cache
from sparse_experts.sweeps.train import Clock, train_jobs
from sparse_experts.training.loop import train
from sparse_experts.training.run import load
from sparse_experts.training.session import Session
from tests.sweeps.sweeps import write_config
from tests.training.tiny import tiny_config

CLOCK = r"seconds_per_step|tokens_per_second|seeds_together|changed|run"


def read(workdir):
  """metrics.jsonl without the clock, and without the final figure of a run that was ended before."""
  with open(f"{workdir}/metrics.jsonl") as f:
    rows = [row for row in map(json.loads, f) if "measure" not in row or row["step"] == 4]
  return [{k: v for k, v in row.items() if not re.fullmatch(CLOCK, k)} for row in rows]


def assert_equal(a, b):
  """To what sums in another order make of float32 in four steps."""
  for one, other in zip(read(a), read(b), strict=True):
    words = {k: v for k, v in one.items() if isinstance(v, str | list)}  # lists: shares of counts
    assert words == {k: v for k, v in other.items() if isinstance(v, str | list)}
    assert {k: v for k, v in one.items() if k not in words} == pytest.approx(
        {k: v for k, v in other.items() if k not in words}, rel=2e-5, abs=1e-6)
  # Adam divides by the root of squared gradients: where those are tiny, their last bits show.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5),
               *(jax.device_get(load(folder).params) for folder in (a, b)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("seeds")
  write_config(folder)

  def make(seed, **keys):
    keys = dict(data__source=f"files:{folder}/text", data__valid_share=0.3, eval__min_bytes=300) | keys
    return tiny_config(train__seed=seed, **keys)

  return make


def never(workdir, error):
  raise AssertionError(f"{workdir} diverged: {error}")


_SPARSE = pytest.param(dict(model__router__jitter=0.1), (0, 1, 2), marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys, seeds_", [(dict(model__num_experts=0), (0, 1)), _SPARSE], ids=["dense", "sparse"])
def test_together_as_alone(keys, seeds_, config, tmp_path, monkeypatch, capsys):
  """Also after a stop by SIGTERM; a third one, which was ahead, goes on by itself."""
  configs = [config(s, **keys) for s in seeds_]
  alone, joint = ([str(tmp_path / f"{how}{s}") for s in seeds_] for how in ("alone", "joint"))
  for c, folder in zip(configs, alone):
    train(c, folder)
  for s in seeds_[2:]:
    train(config(s, train__steps=2, **keys), joint[s])

  def asked(self, step):
    self._why = "SIGTERM" if step == 1 else None
    return self._why

  with monkeypatch.context() as patch, pytest.raises(SystemExit):
    patch.setattr(seeds.Interrupt, "asked", asked)
    seeds.train_seeds(configs, joint, never)
  assert [read(folder)[0]["step"] for folder in joint[:2]] == [1, 1]
  assert len(read(joint[0])) == 1 and capsys.readouterr().err.count("SIGTERM: saved at step 1") == 2
  seeds.train_seeds(configs, joint, never)
  for a, b in zip(alone, joint):
    assert_equal(a, b)
  rows = [json.loads(line) for line in (tmp_path / "joint0/metrics.jsonl").read_text().splitlines()]
  assert [row.get("seeds_together") for row in rows] == [2, 2, 2, 2, None]  # the last is the final figure

  before = [(tmp_path / f"joint{s}/metrics.jsonl").read_bytes() for s in seeds_]
  seeds.train_seeds(configs, joint, never)  # nothing is left to train
  assert before == [(tmp_path / f"joint{s}/metrics.jsonl").read_bytes() for s in seeds_]


@pytest.mark.slow
def test_one_seed_diverges_and_the_others_go_on(config, tmp_path, monkeypatch):
  jobs = [Cache(str(tmp_path)).job("dense", config(0, model__num_experts=0), seed) for seed in (0, 1)]
  after = Session.after

  def poisoned(self, state, pairs):
    if self.config.train.seed == 0 and self.log.done == 1:
      pairs = pairs | {"skipped": (np.ones(()), np.ones(()))}
    after(self, state, pairs)

  monkeypatch.setattr(Session, "after", poisoned)
  said = []
  assert train_jobs(jobs, Clock(), said.append, together=2)
  assert len(said) == 1 and said[0].startswith("dense seed 0, dense seed 1: 2 runs to train")
  lost, other = (job.result() for job in jobs)
  assert "step 2: the loss or its gradient is not finite" in lost.diverged and lost.primary is None
  assert other.primary is not None and other.last["step"] == 4
  assert other.step_seconds < max(row["seconds_per_step"] for row in other.rows if "loss" in row)


@pytest.mark.parametrize("together", [1, 2])
def test_a_stopped_sweep_trains_no_other_run(config, tmp_path, monkeypatch, together):
  """Nor if the signal came when the run was finished already."""
  jobs = [Cache(str(tmp_path)).job("dense", config(0, model__num_experts=0), seed) for seed in (0, 1, 2)]
  begun = []

  def stopped(first, *_, **__):
    begun.append(first)
    raise Stopped("SIGTERM")

  monkeypatch.setattr("sparse_experts.training.loop.train", stopped)
  monkeypatch.setattr(seeds, "train_seeds", stopped)
  assert not train_jobs(jobs, Clock(), lambda _: None, together) and len(begun) == 1


def test_as_many_as_fit(config, tmp_path, monkeypatch):
  c = config(0, model__num_experts=0)
  assert seeds.seeds_that_fit(c, str(tmp_path / "a"), 5) == 1  # a CPU
  need = seeds.step_bytes(c, str(tmp_path / "a"))
  params = 4 * sum(x.size for x in jax.tree.leaves(seeds.set_up(c, str(tmp_path / "a")).abstract.params))
  assert need > 3 * params  # with Adam's two moments

  class Device:
    platform, memory_stats = "gpu", staticmethod(lambda: {"bytes_limit": 4 * need})

  monkeypatch.setattr(seeds, "step_bytes", lambda *_: need)
  monkeypatch.setattr(seeds.jax, "devices", lambda: [Device])
  assert [seeds.seeds_that_fit(c, "", most) for most in (2, 5)] == [2, 3]
  monkeypatch.setattr(Device, "memory_stats", staticmethod(lambda: {"bytes_limit": need // 2}))
  assert seeds.seeds_that_fit(c, "", 5) == 1
