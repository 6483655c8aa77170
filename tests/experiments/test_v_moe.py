"""V-MoE's claims: what is measured, kept and compared; the runs themselves are the package's."""

import math

import numpy as np
import pytest

from experiments.v_moe import __main__ as command
from experiments.v_moe import parts
from sparse_experts.cli import config_file
from sparse_experts.models import describe


def test_information_by_hand():
  """Three images of 4 tokens: classes told wholly, not at all, and by one image of three."""
  label = np.array([0, 1, 1])
  assert parts.information(np.array([[4, 0], [0, 2], [0, 2]]), label) == pytest.approx(math.log(2))
  assert parts.information(np.array([[2, 2], [1, 1], [3, 3]]), label) == pytest.approx(0)
  joint = np.array([[4, 4], [0, 4]]) / 12  # expert by class
  expected = sum(joint[e, c] * math.log(joint[e, c] / joint[e].sum() / joint[:, c].sum())
                 for e in range(2) for c in range(2) if joint[e, c])
  assert parts.information(np.array([[4, 0], [4, 0], [0, 4]]), label) == pytest.approx(expected)


def test_what_is_done_is_kept(tmp_path, capsys):
  made = []
  figures = lambda: made.append(1) or {"accuracy": 0.5}
  for _ in range(2):
    found = command.Kept(str(tmp_path), quick=True).get("capacity/choice/0.1", figures)
    assert found["accuracy"] == 0.5
  assert len(made) == 1
  assert capsys.readouterr().out.count("capacity/choice/0.1: accuracy 0.5") == 2
  assert command.main(["capacity", f"--out={tmp_path}"]) == 2
  assert "holds results with --quick; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["capcity"], "error: part 'capcity' is unknown; did you mean 'capacity'?"),
    (["--steps=3"], "error: unrecognized arguments: --steps=3")])
def test_mistakes(argv, message, capsys):
  assert command.main(argv) == 2
  assert message in capsys.readouterr().err


def test_the_three_arms_do_equal_work():
  load = lambda arg: config_file.load(f"experiments/v_moe/config_cifar.py{arg}")
  flops = [describe(load(arg), 10)["flops_per_token"] for arg in ("", ":dense", ":soft_moe")]
  assert max(flops) / min(flops) < 1.01
