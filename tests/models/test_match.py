"""Two configs are made equal by their widths alone, or it is said what is left."""

import pytest

from sparse_experts.config import dense_twin
from sparse_experts.config.dotted import replaced
from sparse_experts.models import describe
from sparse_experts.models.match import EQUAL, match, match_both
from tests.models.tiny import VOCAB, tiny


def flops(config):
  return describe(config, VOCAB)["flops_per_token"]


def params(config):
  return describe(config, VOCAB)["params_total"]


def wide(**model):
  """Wide enough that a multiple of 8 is within 1%."""
  return tiny(**dict(dict(embed_dim=32, mlp_dim=256, num_layers=2), **model))


def test_a_twin_of_other_width_gets_the_flops_of_its_sparse_model():
  sparse = wide(expert_dim=512)
  dense = dense_twin(wide(expert_dim=256))
  found = match(dense, flops(sparse), flops)
  assert found.is_equal and found.overrides == {"model.expert_dim": 512}  # the dense layers keep theirs
  assert flops(replaced(dense, found.overrides)) == found.reached
  assert found.excess == pytest.approx(found.reached / flops(sparse) - 1)
  assert flops(sparse) > found.reached  # by the router


def test_a_dense_model_gets_the_parameters_of_a_sparse_one():
  sparse, dense = wide(num_experts=8), wide(num_experts=0)
  found = match(dense, params(sparse), params)
  # Eight experts and one dense FFN in two layers of the same width: 4.5 times as wide.
  assert found.overrides == {"model.mlp_dim": 1152} and found.is_equal
  assert params(replaced(dense, found.overrides)) == found.reached
  assert dense.model.mlp_dim == 256  # the config that was asked about is left alone


def test_a_sparse_model_gets_the_parameters_of_a_dense_one():
  """By narrower experts; where those do not suffice, the dense FFNs shrink too."""
  dense = wide(num_experts=0, mlp_dim=512)
  found = match(wide(num_experts=4), params(dense), params)
  assert list(found.overrides) == ["model.expert_dim"] and found.is_equal
  found = match(wide(num_experts=4, mlp_dim=1024, expert_dim=1024), params(dense), params)
  assert found.overrides == {"model.expert_dim": 8, "model.mlp_dim": 992} and found.is_equal


def test_equal_already():
  config = wide()
  found = match(config, flops(config) * (1 + 0.9 * EQUAL), flops)
  assert found.is_equal and not found.overrides


def test_the_largest_multiple_that_is_equal_wins():
  config = wide(num_experts=0, mlp_dim=256)
  for width, found in ((1024, 1024), (1030, 1024), (1100, 1104), (1095, 1088)):
    assert match(config, params(replaced(config, {"model.mlp_dim": width})), params).overrides == {
        "model.mlp_dim": found}


def test_widths_divide_over_the_mesh():
  config = wide(num_experts=0)
  with config.unlocked():
    config.mesh.model = 24
  assert match(config, params(config) * 2, params).overrides["model.mlp_dim"] % 24 == 0


def test_what_is_left_is_said():
  """Attention alone costs more than the target; nothing is narrower than 8."""
  config = wide()
  found = match(config, flops(config) / 20, flops)
  assert not found.is_equal and found.narrowest and found.excess > 1
  assert found.overrides == {"model.mlp_dim": 8}  # the experts' width too, as they have none of their own
  coarse = wide(num_experts=0)
  with coarse.unlocked():
    coarse.mesh.model = 512
  found = match(coarse, 1.5 * params(replaced(coarse, {"model.mlp_dim": 512})), params)
  assert not found.is_equal and not found.narrowest and abs(found.excess) < 0.5


MEASURES = "flops_per_token", "params_total"


def of_both(config):
  counts = describe(config, VOCAB)
  return {name: counts[name] for name in MEASURES}


@pytest.mark.parametrize("heads", [2, 3])
def test_heads_are_matched_in_flops_and_parameters_at_once(heads):
  """Gates aside by r' = r - 2 d / (c k) and E' = h (E c r - 2 d) / (c r'), here whole numbers."""
  sizes = dict(num_layers=1, moe_every=1, embed_dim=96, activation="relu", router=dict(k=2))
  targets = of_both(tiny(**sizes, expert_dim=192, num_experts=8))
  config = tiny(**sizes, moe_heads=heads, expert_dim=64, num_experts=4)
  found = match_both(config, targets, of_both)
  formula = {"model.expert_dim": 144, "model.num_experts": 10 * heads}
  by_formula = of_both(replaced(config, formula))
  assert by_formula["flops_per_token"] - targets["flops_per_token"] == 2 * 96 * (10 * heads - 8)  # gates
  assert by_formula["params_total"] - targets["params_total"] == 192 + 2 * 96  # and biases of projections
  worst = lambda counts: max(abs(counts[name] / targets[name] - 1) for name in MEASURES)
  reached = {name: m.reached for name, m in found.items()}
  assert reached == of_both(replaced(config, found["params_total"].overrides))
  assert worst(reached) < worst(by_formula)  # which leaves gates out; experts of so small a model are coarse


def test_a_fine_grained_model_is_matched_and_what_is_equal_stays():
  plain = wide(expert_dim=256, num_experts=8, router=dict(k=2))
  fine = wide(expert_dim=64, num_experts=8, router=dict(k=4))
  found = match_both(fine, of_both(plain), of_both)
  assert found["params_total"].overrides == {"model.expert_dim": 128, "model.num_experts": 16}
  assert all(m.is_equal for m in found.values())
  assert not match_both(plain, of_both(plain), of_both)["params_total"].overrides


def test_experts_divide_over_the_mesh():
  plain = wide(expert_dim=256, num_experts=8, router=dict(k=2))
  config = wide(expert_dim=64, num_experts=6, moe_heads=2, router=dict(k=2))
  with config.unlocked():
    config.mesh.expert, config.mesh.model = 6, 24
  found = match_both(config, of_both(plain), of_both)["params_total"].overrides
  assert found["model.num_experts"] % 6 == 0 and found["model.expert_dim"] % 24 == 0
