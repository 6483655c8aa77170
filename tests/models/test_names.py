"""A parameter's name depends on its layer, not on which layers are stacked with it."""

import jax
import numpy as np
import pytest

from sparse_experts.models import build, names
from tests.models.tiny import VOCAB, tiny


def abstract(*args, **model):
  built = build(tiny(*args, **model), VOCAB)
  return built, jax.eval_shape(built.init, jax.random.key(0))[0]


@pytest.mark.parametrize("case", [
    dict(), dict(num_experts=0), dict(moe_layers=(3,)), dict(name="seq2seq", num_layers=2)], ids=str)
def test_names_are_where_the_stacks_say(case):
  model, params = abstract(**case)
  places = names.places(params)
  assert len(set(places.values())) == len(places)  # each place has one name
  stacked = {name for name, place in places.items() if place.repeat is not None}
  expected = {}
  for name, stack in model.stacks.items():
    for layer in range(len(stack.kinds)):
      segment, repeat, position = stack.where(layer)
      path = (name, "blocks", str(segment), str(position))
      for rest in names.by_path(params[name]["blocks"][str(segment)][str(position)]):
        expected["/".join((f"{name}/{layer:02d}", *rest))] = names.Place((*path, *rest), repeat)
  assert {name: places[name] for name in stacked} == expected
  assert "embedding/table" in places.keys() - stacked


def test_a_dense_and_a_sparse_model_share_what_both_have():
  sparse, dense = (names.shapes(abstract(num_experts=n)[1]) for n in (4, 0))
  assert sparse["decoder/03/ffn/router/w"] == (16, 4)
  same = {name for name in sparse.keys() & dense.keys() if sparse[name] == dense[name]}
  assert {"decoder/00/attention/query", "decoder/03/attention/query", "decoder/02/ffn/w_in"} <= same
  assert not {name for name in same if name.startswith(("decoder/01/ffn/", "decoder/03/ffn/"))}


def test_buffers_are_named_by_their_layers():
  _, params = abstract()
  buffers = {"decoder": {"blocks": {"0": {"1": {"ffn": {"router": {"bias": np.zeros((2, 4))}}}}}}}
  assert names.shapes(buffers, params) == {f"decoder/{n}/ffn/router/bias": (4,) for n in ("01", "03")}


def test_the_first_differences_are_told():
  there, here = dict(a=(2,), b=(3,), d=(4,), e=(1,)), dict(a=(2,), b=(5,), c=(4,), e=(2,))
  assert names.difference(there, there) == ""
  assert names.difference(there, here) == (
      "b is (3,) there and (5,) here, c is absent there and (4,) here, d is (4,) there and absent here"
      " and 1 more differ")
