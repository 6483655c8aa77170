"""The names known before jax is imported are those of the tables next to the implementations."""

import pytest

from sparse_experts import moe, validation
from sparse_experts.config import default_config, dense_twin, from_json, paths, to_json
from sparse_experts.errors import UserError
from sparse_experts.moe.grouped import layout
from sparse_experts.moe.routers import top_k
from sparse_experts.moe.routing import lists
from sparse_experts.training import objectives, optimizer


@pytest.mark.parametrize("key, table", [
    ("model.activation", moe.ACTIVATIONS),
    ("model.dispatch", moe.DISPATCHES),
    ("model.backend", layout.BACKENDS),
    ("model.capacity_rule", moe.CAPACITY_RULES),
    ("model.router.choose", top_k.CHOOSE),
    ("model.router.gate", top_k.GATES),
    ("model.router.order", lists.ORDERS),
    ("model.router.balance_count", top_k.BALANCE_COUNTS),
    ("optimizer.name", optimizer.OPTIMIZERS),
    ("optimizer.schedule", optimizer.SCHEDULES),
    ("train.layer_losses", objectives.LAYER_LOSSES),
])
def test_choices_match_the_tables(key, table):
  assert set(validation.CHOICES[key]) == set(table)


def test_every_checked_key_exists():
  known = set(paths(default_config()))
  ranges = {key for keys in validation.AT_LEAST.values() for key in keys}
  assert {*validation.CHOICES, *validation.SHARES, *ranges} <= known


def test_every_number_is_checked():
  config = default_config()
  checked = {*validation.SHARES, *(key for keys in validation.AT_LEAST.values() for key in keys)}
  for key in paths(config):
    section, name = key.rsplit(".", 1) if "." in key else ("", key)
    node = config
    for part in filter(None, section.split(".")):
      node = node[part]
    if node.get_type(name) in (int, float) and ".decoder." not in key:
      assert key in checked, f"{key} is a number without a range in validation.py"


def test_json_round_trip():
  config = default_config().unlock()
  config.model.moe_layers = (1, 3)
  config.data.mean_span = 3.0
  again = from_json(to_json(config))
  assert again.to_dict() == config.to_dict()
  assert again.is_locked


def test_json_keeps_keys_that_a_router_added():
  config = default_config().unlock()
  config.model.router.temperature = 2.0
  assert from_json(to_json(config)).model.router.temperature == 2.0


def test_dense_twin_has_no_router():
  config = default_config()
  twin = dense_twin(config)
  assert twin.model.num_experts == 0 and config.model.num_experts == 8  # the twin is a copy
  validation.validate(twin)


def test_an_own_router_is_welcome():
  config = default_config().unlock()
  config.model.router.name = "package.module:Class"
  validation.validate(config)
  config.model.router.name = "topk"
  with pytest.raises(UserError, match=r"did you mean 'top_k'. or give package.module:Class"):
    validation.validate(config)
