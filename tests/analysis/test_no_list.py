"""What looks at assignments refuses layers that make none, and names the layer."""

import pytest

from sparse_experts.analysis import regret, replay, trace
from sparse_experts.analysis.probe import probe
from sparse_experts.errors import UserError
from tests.analysis.tiny_run import SEQ2SEQ, bare_run, tiny_dataset, tiny_run

LISTED = dict(SEQ2SEQ, model__decoder__router__name="top_k")


@pytest.mark.parametrize("look, router", [
    (trace.trace, "soft_moe"), (regret.regret, "smear"), (replay.replay, "soft_moe"),
    (lambda *of: replay.replay(*of, router="soft_moe"), "top_k")],
    ids=["trace", "regret", "replay", "replay through one"])
def test_it_is_refused_in_one_line(look, router):
  keys = LISTED if router != "top_k" else dict(SEQ2SEQ, model__decoder__num_experts=0)
  run = bare_run(**keys, model__router__name=router)
  with pytest.raises(UserError, match="^layer encoder/01 assigns no token to an expert: .* such as top_k$"):
    look(run, probe(run, 2, tiny_dataset(run)))


def test_a_trace_passes_over_a_mixture_of_depths():
  """Its block has a metric, but no list; the sparse layers beside it have theirs."""
  run = tiny_run(**SEQ2SEQ, model__depth_layers=(0,), model__depth_capacity=0.25)
  found = trace.trace(run, probe(run, 2, tiny_dataset(run)))
  assert set(found["layer"]) == {"encoder/01", "decoder/01"}
