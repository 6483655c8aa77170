"""The table of a sweep: routing next to loss, columns that say the same of all arms, arms that collapsed."""

import pytest

from sparse_experts.analysis import table
from sparse_experts.analysis.balance import balance, collapsed, mean_dropped, num_experts, unequal_drops
from sparse_experts.analysis.compare import Group
from sparse_experts.analysis.outcome import MOST_POINTS, curve, outcome, train_seconds
from sparse_experts.config import default_config
from sparse_experts.results import Result

FACT = dict(rate=0.01, params_total=2e6, params_active=7e5, flops_per_token=1.7e6)


def result(seed=0, value=2.0, steps=10, dead=(0, 0), experts=8, together=1):
  """Two sparse layers, logged every 5 steps; in the last interval 10 and 30% are dropped."""
  config = default_config().unlock()
  config.train.seed, config.train.steps, config.model.num_experts = seed, steps, experts
  rows = [{"step": step, "loss": 4.0 - step / 10, "seconds_per_step": 0.5, "seeds_together": together}
          for step in range(5, steps + 1, 5)]
  for i, layer in enumerate(("decoder/01", "decoder/03") if experts else ()):
    for row in rows:
      row |= {f"router/{layer}/dropped": 0.9, f"router/{layer}/load_max_mean": 8.0, f"router/{layer}/dead": 8}
    rows[-1] |= {f"router/{layer}/dropped": 0.1 + 0.2 * i, f"router/{layer}/load_max_mean": 3.0 - i,
                 f"router/{layer}/dead": dead[i]}
  rows.append({"step": steps, "eval/final/nats_per_byte": value, "measure": "m", "data_fingerprint": "d",
               "eval/final/router/decoder/01/load_max_mean": 9.0})
  return Result("", config, tuple(rows), "")


def group(name, *runs):
  return Group(name, {run.seed: run for run in runs})


@pytest.fixture
def groups():
  return [group("dense", result(0, 2.0, experts=0), result(1, 3.0, experts=0)),
          group("switch", result(0, 2.1, dead=(1, 0)), result(1, 3.1)),
          group("reinforce", result(0, 2.1), result(1, 3.1, dead=(0, 7)))]


def cells(text):
  lines = [line for line in text.splitlines() if line.startswith("| ")]
  head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
  return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_routing_is_of_the_worst_layer_at_the_end_of_training(groups):
  found = balance(result(dead=(1, 2)))
  assert (found.dropped, found.dead, found.experts, found.max_vio) == (pytest.approx(0.3), 2, 8, 2.0)
  assert balance(result(experts=0)) is None
  rows = cells(table.markdown(groups, "dense", dict.fromkeys(("dense", "switch", "reinforce"), FACT)))
  routing = lambda arm: [rows[arm][name] for name in ("dropped", "dead", "MaxVio", "seconds", "ms/step")]
  assert routing("dense") == ["-", "-", "-", "5.0", "500.0"]
  assert routing("switch") == ["30.0%", "0.5 of 8", "2.00", "5.0", "500.0"]
  assert rows["switch"]["params (active)"] == "2M (700k)"


def test_an_arm_with_dead_experts_does_not_read_level(groups):
  """Both arms are 0.1 above dense; of one, seven of eight experts are dead in one of two runs."""
  text = table.markdown(groups, "dense", dict.fromkeys(("dense", "switch", "reinforce"), FACT))
  rows = cells(text)
  assert rows["switch"]["minus dense"] == "+0.1000" and rows["switch"]["dead"] == "0.5 of 8"
  assert rows["reinforce"]["minus dense"] == "+0.1000 †" and rows["reinforce"]["dead"] == "3.5 of 8 †"
  assert "† reinforce: 7 of 8 experts dead in 1 of 2 runs;" in text and "† switch" not in text
  assert collapsed([result(dead=(4, 0))]) == ""  # half are alive
  assert outcome(groups, "dense")["arms"]["reinforce"]["remarks"] == ["7 of 8 experts dead in 1 of 2 runs"]


def test_what_is_the_same_for_all_arms_is_in_the_notes(groups):
  facts = {"dense": FACT, "switch": FACT, "reinforce": FACT}
  text = table.markdown(groups, "dense", facts)
  assert "- Seeds 0, 1; learning rate 0.01; pairs 2.\n" in text
  assert max(map(len, text.splitlines())) < 240  # an item per column, not one paragraph of all
  assert not {"seeds", "diverged", "learning rate", "pairs"} & cells(text)["dense"].keys()
  rows = cells(table.markdown(groups, "dense", facts | {"switch": FACT | {"rate": 0.03}}))
  assert [row["learning rate"] for row in rows.values()] == ["0.01", "0.03", "0.01"]
  # Every column is explained, but for those that say themselves what they are.
  columns = cells(text)["dense"].keys() - {"arm", "nats per byte", "minus dense"}
  assert not [name for name in columns if f"{name}:" not in text]


def test_dropped_shares_that_differ_are_said():
  """Of two layers and two rows, 0.9 and 0.1 or 0.3: the mean is 0.6 in the layer where it is largest."""
  assert mean_dropped(result()) == pytest.approx(0.6) and mean_dropped(result(experts=0)) is None
  assert unequal_drops({"a": [0.2, 0.4], "b": [0.0], "c": [0.01], "dense": [None]}) == (
      "dropped in training: b 0.0%, a 30.0% of assignments: drops have a part in the difference; "
      "model.capacity_factor sets the capacity of both, 0 drops nothing")
  assert unequal_drops({"a": [0.302], "b": [0.3]}) == unequal_drops({"a": [0.3], "dense": [None]}) == ""


def test_runs_that_do_not_compare_have_a_table_all_the_same(groups):
  names, rows, notes = table.table(groups, "dense", first="run", paired=False)
  assert names[0] == "run" and "params (active)" not in names
  assert [row[names.index("minus dense")] for row in rows] == [""] * 3
  assert all("None" not in note for note in notes)


def test_curves_are_thinned_and_keep_their_end():
  run = result(steps=5005, together=2)
  found = curve(run)
  assert train_seconds(run) == pytest.approx(5005 * 0.25)
  assert len(found["step"]) == len(found["loss"]) <= MOST_POINTS
  assert found["step"][-1] == 5005 and found["minutes"][-1] == pytest.approx(5005 * 0.25 / 60, abs=1e-4)
  assert curve(result(steps=20)) == {
      "step": [5, 10, 15, 20], "minutes": pytest.approx([0.0417, 0.0833, 0.125, 0.1667]),
      "loss": [3.5, 3.0, 2.5, 2.0]}
  run.rows[-2]["loss"] = float("nan")  # JSON has none, and an axis cannot fit it
  assert curve(run)["step"][-1] == 5000


def test_experts_of_a_stack():
  config = default_config().unlock()
  config.model.name, config.model.num_experts = "seq2seq", 8
  assert num_experts(config, "encoder/01") == num_experts(config, "decoder/01") == 8
  config.model.decoder.num_experts = 4
  assert [num_experts(config, layer) for layer in ("encoder/01", "decoder/01")] == [8, 4]
