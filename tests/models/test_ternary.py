"""A config line makes the experts of any model ternary."""

import jax
import pytest

from sparse_experts.errors import UserError
from sparse_experts.models import build, describe
from sparse_experts.moe import TernaryExperts
from sparse_experts.validation import validate
from tests.models.tiny import VOCAB, tiny


@pytest.mark.parametrize("model, norm", [(dict(), "rms"), (dict(ternary=dict(norm="none")), "none"),
                                         (dict(name="seq2seq", moe_heads=2), "rms")])
def test_the_experts_of_a_model(model, norm):
  config = tiny(**dict(dict(expert_weights="ternary", activation="relu"), **model))
  stack = build(config, VOCAB).stacks["decoder"]
  experts = stack.block(1).ffn.experts
  assert isinstance(experts, TernaryExperts) and (experts.norm, experts.activation_bits) == (norm, 8)
  axes = {name for names in jax.tree.leaves(stack.axes["0"]["1"]["ffn"]["experts"]) for name in names or ()}
  assert "mlp" not in axes
  full = tiny(**dict(dict(activation="relu"), **model) | dict(ternary={}))
  assert describe(config, VOCAB)["params_total"] == describe(full, VOCAB)["params_total"]


def test_merged_experts_cannot_be_ternary():
  config = tiny("seq2seq", expert_weights="ternary", router=dict(name="smear"))
  config.data.objective, config.data.length, config.train.batch_size = "span_corruption", 16, 4
  with pytest.raises(UserError, match="'smear' merges experts, whose sum is not ternary, but"):
    validate(config)
