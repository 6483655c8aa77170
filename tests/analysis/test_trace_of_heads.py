"""Analyses of layers that cut tokens into sub-tokens."""

import numpy as np
import pytest

from sparse_experts.analysis.probe import probe
from sparse_experts.analysis.regret import forward_passes
from sparse_experts.analysis.replay import replay
from sparse_experts.analysis.summary import rows, saturation
from sparse_experts.errors import UserError
from tests.analysis.tiny_run import HEADS, bare_run, tiny_dataset, tiny_run


def test_regret_refuses_tokens_without_one_choice():
  run = bare_run(**HEADS)
  with pytest.raises(UserError, match="decoder/00: each token is cut into 2 sub-tokens .*moe_heads"):
    forward_passes(run, probe(run, 2, tiny_dataset(run)))


@pytest.mark.slow
def test_a_replay_compares_the_experts_of_sub_tokens():
  run = tiny_run(**HEADS)
  batch = probe(run, 11, tiny_dataset(run))
  same, other = replay(run, batch, dispatch="scatter"), replay(run, batch, router="random")
  assert same["agreement"] == 1 and other["agreement"] < 0.9


def test_a_summary_counts_tokens_and_follows_sub_tokens():
  """Two tokens of two parts; one part of one token changes its expert between the steps."""
  each = np.array([(s, t, h) for s in (1, 2) for t in (0, 1) for h in (0, 1)], np.int32)
  step, position, head = each.T
  expert = np.where((step == 1) & (position == 1) & (head == 1), 0, head).astype(np.int32)
  traced = dict(step=step, layer=np.full(8, "decoder/00"), example=0 * step, position=position, head=head,
                domain=0 * step, rank=0 * step, expert=expert, valid=step > 0, kept=step > 0,
                entropy=np.zeros(8, np.float32))
  assert saturation(traced) == {(1, "decoder/00"): 0.75, (2, "decoder/00"): 1.0}
  assert [row[2] for row in rows(traced, {"decoder/00": 2}, ["all"])] == ["2", "2"]
