"""The summary of a trace whose routing was written by hand."""

import numpy as np

from sparse_experts.analysis import summary

DOMAINS = ("email", "json", "tiny")


def columns():
  """Of 300 tokens of 4 experts: email spread evenly, json mostly to expert 2, one token of `tiny` to 3.

  Two assignments were skipped by the router, 27 dropped; a second step goes all to expert 0.
  """
  domain = np.repeat([0, 1, 2], [200, 99, 1])
  expert = np.concatenate([np.arange(200) % 4, np.where(np.arange(99) < 66, 2, 1), [3]])
  valid = np.arange(300) != 0
  valid[4] = False  # both would have gone to expert 0
  kept = valid & (np.arange(300) >= 32)
  kept[:4] = valid[:4]
  place = dict(example=np.arange(300) // 100, position=np.arange(300) % 100, head=np.zeros(300, int))
  one = dict(**place, step=np.full(300, 1), layer=np.full(300, "decoder/01"), rank=np.zeros(300, int),
             domain=domain, expert=expert, valid=valid, kept=kept, entropy=np.linspace(0, 2, 300))
  two = one | dict(step=np.full(300, 2), expert=np.zeros(300, int), valid=valid | True, kept=valid | True)
  return {name: np.concatenate([one[name], two[name]]) for name in one}


def test_a_line_per_step_and_layer():
  first, second = summary.rows(columns(), {"decoder/01": 4}, DOMAINS)
  load = np.array([48, 50 + 33, 50 + 66, 51])
  dropped = 27 / 298  # tokens 4 to 31 but the skipped one
  assert first == (1, "decoder/01", "300", f"{116 / load.mean():.2f}", "1.00", f"{dropped:.1%}", "16%",
                   "json", 2, "67%", f"{116 / 298:.0%}")
  assert second[:6] == (2, "decoder/01", "300", "4.00", "1.00", "0.0%")
  assert second[6] == "100%"  # the last step; of step 1, the 48 of 300 tokens that expert 0 had


def test_skipped_choices_are_no_assignments():
  assert summary.assignments(columns()) == "598 assignments and 2 skipped choices"
  of_step_2 = {name: a[300:] for name, a in columns().items()}
  assert summary.assignments(of_step_2) == "300 assignments"


def test_saturation_is_the_share_of_the_last_experts():
  """Two experts a token: token 0 keeps one of them, token 1 both; token 2 has no expert in the end."""
  expert = np.array([[0, 1], [2, 3], [0, 1], [1, 2], [3, 2], [0, 3]])
  columns = dict(
      step=np.repeat([5, 9], 6), layer=np.full(12, "decoder/01"), example=np.zeros(12, int),
      position=np.tile(np.repeat([0, 1, 2], 2), 2), head=np.zeros(12, int),
      expert=expert.reshape(-1), valid=np.array([True] * 10 + [False] * 2))
  assert summary.saturation(columns) == {(5, "decoder/01"): 0.75, (9, "decoder/01"): 1.0}


def test_loads_by_domain():
  traced = {name: a[:300] for name, a in columns().items()}
  assert summary.domain_loads(traced, 3, 4).tolist() == [[48, 50, 50, 50], [0, 33, 66, 0], [0, 0, 0, 1]]
