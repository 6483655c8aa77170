"""Which tiles are tried, and what is said of them; the kernel is interpreted here, and no TPU is needed."""

import json

import jax
import pytest

from sparse_experts import cli, partitioning
from sparse_experts.benchmark import layer, tiles
from tests.training.test_measures import undefined

TINY = layer.Workload(64, 16, 32, 4, 2, "swiglu", group_size=32)


def test_tiles_are_not_wider_than_experts():
  assert tiles.candidates(TINY) == [
      "ragged_dot", "megablox:128x128x128", "megablox:256x128x128", "megablox:512x128x128"]
  wide = tiles.candidates(layer.WORKLOADS["st_moe_large"])
  assert len(wide) == len(set(wide)) == 1 + 3 * 4 * 4 and "megablox:512x1024x2048" in wide


def test_without_a_tpu(capsys):
  assert cli.main(["benchmark", "tiles"]) == 2
  assert "benchmark tiles needs a TPU and this is a cpu" in capsys.readouterr().err


def test_the_fastest_is_named(monkeypatch, capsys):
  """With times of our own: what does not fit is left out, and no number lacks its definition."""
  run = {"ragged_dot": 2.0, "megablox:128x128x128": 1.0, "megablox:256x128x128": 3.0}

  class Program:
    def __init__(self, backend):
      self.backend = backend

    def __call__(self):
      if self.backend not in run:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem")

  monkeypatch.setitem(layer.WORKLOADS, "switch", TINY)
  monkeypatch.setattr(partitioning, "platform", lambda: "tpu")
  monkeypatch.setattr(tiles, "layer_programs", lambda made, x: {
      "forward_backward": Program(made.experts.backend)})
  monkeypatch.setattr(tiles, "interleave", lambda programs, runs: {
      name: type("Sample", (), {"median": run[name]}) for name in programs})
  assert cli.main(["benchmark", "tiles", "--workload=switch", "--json"]) == 0
  out = capsys.readouterr().out
  assert "megablox:512x128x128: too large" in out
  assert "fastest: --config.model.backend=megablox:128x128x128" in out
  found = json.loads(out.splitlines()[-1])
  assert found["backend_ms"] == run and found["fastest"] == "megablox:128x128x128"
  assert not undefined(["backend_ms"])


@pytest.mark.parametrize("arguments, message", [
    (["--workload=scaling"], "--workload=scaling is no layer to try tiles on"),
    (["--backend=slots"], "--backend is for benchmark layer")])
def test_mistakes(arguments, message, capsys):
  assert cli.main(["benchmark", "tiles", *arguments]) == 2
  assert message in capsys.readouterr().err
