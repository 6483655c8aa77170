"""--quick of the repository's claims: one of each way of measuring, which proves only that it runs."""

import pathlib

import pytest

from sparse_experts import cli
from sparse_experts.cli import claim as claim_command
from sparse_experts.ledger import claim_file

ROOT = pathlib.Path(__file__).parent.parent.parent
CLAIMS = claim_file.ledger(str(ROOT / "experiments"))
ONE_OF_EACH = {claim.fixed.get("measure"): name for name, claim in CLAIMS.items()
               if "cpu" in claim.fixed["scales"] and "data" not in claim.fixed}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ONE_OF_EACH.values()))
def test_it_runs(name, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  before = pathlib.Path(CLAIMS[name].path).read_bytes()
  assert cli.main(["claim", "run", name, "--quick", f"--runs={tmp_path}"]) == 0
  assert "it runs: " in capsys.readouterr().out
  assert pathlib.Path(CLAIMS[name].path).read_bytes() == before


def test_the_example_of_a_message_is_a_claim():
  assert claim_command.EXAMPLE in CLAIMS


def test_every_paired_claim_has_a_control_that_was_shown():
  """Or is one; a claim whose control failed is underpowered, which `claim run` sees to."""
  for claim in CLAIMS.values():
    if claim.paired and "cpu" in claim.fixed["scales"]:
      control = claim if claim.fixed.get("is_control") else CLAIMS[claim.fixed["control"]]
      assert control.fixed["is_control"], claim.name


def test_what_was_printed_with_a_result_follows_from_its_figures():
  """Nobody edits a verdict: every paired result is judged again from the figures that stand next to it."""
  from sparse_experts.ledger import run

  for claim in CLAIMS.values():
    for result in claim.results if claim.paired else ():
      again = run.judged(claim, result["figures"], None)
      kept = {key: result[key] for key in again}
      if "control" not in result.get("why", ""):
        assert kept == again
