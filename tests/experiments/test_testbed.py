"""Figures that claims on testbeds are judged by: which there are, and that the best routing is the best."""

import json
import pathlib

import pytest

from experiments.testbed import deep, measure
from sparse_experts import cli
from sparse_experts.data.testbeds import STREAMS
from sparse_experts.errors import UserError
from sparse_experts.ledger import claim_file

ROOT = pathlib.Path(__file__).parents[2]
CLAIMS = {name: claim for name, claim in claim_file.ledger(str(ROOT / "experiments")).items()
          if claim.fixed.get("measure", "").startswith("experiments.testbed.")}
TOP_K = {"router": "top_k", "rate": 0.01}


@pytest.fixture
def losses(monkeypatch):
  """Instead of training: what each router reaches; asked again it is asked for."""
  of, asked = {"task": 1.0, "random": 3.0, "top_k": 1.5, "dense": float("nan")}, []

  def run(arm, seed, quick):
    asked.append(json.loads(arm))
    return {"loss": of[asked[-1]["router"]]}

  monkeypatch.setattr(measure, "_run", run)
  return asked


def test_an_oracle_gap_has_references_of_the_same_stream_and_size(losses):
  arm = TOP_K | {"stream": "languages", "steps": 7, "expert_dim": 4, "arguments": {"k": 2}, "layer": {}}
  assert measure.oracle_gap(arm, 0, False) == 0.25
  own, oracle, random = losses
  assert own == arm
  assert oracle == {"router": "task", "rate": 0.01, "stream": "languages", "steps": 7, "expert_dim": 4}
  assert random == oracle | {"router": "random", "arguments": {"draw": "token"}}


def test_facts_minus_arithmetic(monkeypatch):
  found = {"loss_facts": 2.5, "loss_arithmetic": 2.0}
  monkeypatch.setattr(measure, "_run", lambda arm, seed, quick: found)
  assert measure.facts_minus_arithmetic(TOP_K, 0, False) == 0.5
  found["loss_facts"] = float("nan")
  assert measure.facts_minus_arithmetic(TOP_K, 0, False) is None


def test_what_diverged_has_no_gap(losses):
  assert measure.oracle_gap({"router": "dense", "rate": 1.0}, 0, False) is None


def test_a_figure_that_a_stream_does_not_have_is_named(losses):
  with pytest.raises(UserError) as error:
    measure.loss_facts(TOP_K, 0, False)
  assert "an arm with router='top_k' and stream='clusters' has no figure loss_facts; it has loss" in str(
      error.value)


def test_a_wrong_stream_is_one_line():
  with pytest.raises(UserError) as error:
    measure.loss(TOP_K | {"stream": "langauges"}, 0, False)
  assert str(error.value) == "an arm's stream='langauges' is unknown; did you mean 'languages'?"


def test_every_arm_of_a_claim_can_be_built():
  """Its fields and its stream are known; nothing is compiled."""
  assert CLAIMS
  for claim in CLAIMS.values():
    for arm in claim.fixed["arms"].values():
      if claim.fixed["measure"].startswith("experiments.testbed.deep:"):
        of_figure = {"large", "small", "ladder"}
        deep._program(measure.text({key: arm[key] for key in arm.keys() - of_figure}), True)
      else:
        measure.bench(arm, quick=True)


@pytest.mark.slow
def test_losses_of_kinds_are_those_of_their_tokens():
  """A group has as many facts as arithmetic items, so their mean is the loss; one kind alone is all of it."""
  arm = {"router": "dense", "rate": 0.01}
  mixed, facts = (measure.bench(arm | {"stream": stream}, quick=True).run(0.01, 0)
                  for stream in ("facts_and_arithmetic", "facts"))
  assert (mixed["loss_facts"] + mixed["loss_arithmetic"]) / 2 == pytest.approx(mixed["loss"], abs=1e-5)
  assert abs(mixed["loss_facts"] - mixed["loss_arithmetic"]) > 0.01
  assert facts["loss_facts"] == facts["loss"] and "loss_arithmetic" not in facts


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["clusters", "composites", "facts", "languages"])
def test_the_best_routing_is_the_best(stream):
  """After 300 steps: the oracle beats random routing, and a router that learns stands between."""
  shared = {"stream": stream, "steps": 300}
  gap = measure.oracle_gap(shared | TOP_K, 0, False)
  assert -0.1 < gap < 0.9
  oracle, random = (measure.loss(shared | {"rate": 0.01} | of, 0, False)
                    for of in (measure.ORACLE, measure.RANDOM))
  assert STREAMS[stream].floor < oracle < random - 0.1


@pytest.mark.slow
def test_arithmetic_is_one_task_however_it_is_routed():
  """By the sequence's number or by lot: the loss of two such runs differs by chance only."""
  shared = {"stream": "arithmetic", "steps": 300, "expert_dim": 8, "rate": 0.01}
  oracle, random = (measure.loss(shared | of, 0, False) for of in (measure.ORACLE, measure.RANDOM))
  assert oracle == pytest.approx(random, abs=0.05)


@pytest.mark.slow
def test_clusters_give_what_is_stored():
  """The dense arm's row of routers_side_by_side; 0.01: other optimizations round otherwise for 1000 steps."""
  rows = json.loads((ROOT / "experiments/routers_side_by_side/results.json").read_text())
  stored = next(row for row in rows if (row["arm"], row.get("seed"), row.get("rate")) == ("dense", 0, 0.03))
  assert measure.loss({"router": "dense", "rate": 0.03}, 0, False) == pytest.approx(stored["loss"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["testbed/languages_found", "testbed/mixture_facts"])
def test_a_claim_runs(name, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  assert cli.main(["claim", "run", name, "--quick", f"--runs={tmp_path}"]) == 0
  assert "it runs" in capsys.readouterr().out
