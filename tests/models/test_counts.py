import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.config import dense_twin
from sparse_experts.models import build, describe
from sparse_experts.moe import DISPATCHES, Dispatch, TopKRouter
from sparse_experts.moe.grouped import layout as layouts
from sparse_experts.moe.grouped import slots
from tests.models.tiny import VOCAB, init, jit, make_batch, tiny


def test_flops_of_a_tiny_decoder_by_hand():
  config = tiny(num_layers=2, router=dict(k=2))
  config.data.length = 10
  counts = describe(config, VOCAB)
  d, f, heads = 16, 24, 2 * 8
  attention = 2 * 4 * d * heads + 2 * 2 * heads * (1 + 10) / 2
  assert counts["flops"] == {
      "ffn": 2 * 3 * d * f + 2 * (2 * 3 * d * f), "router": 2 * d * 4, "attention": 2 * attention,
      "head": 2 * d * VOCAB}
  assert counts["flops_per_token"] == sum(counts["flops"].values())
  assert [row["kind"] for row in counts["layers"]] == ["dense", "sparse"]
  assert counts["params_total"] - counts["params_active"] == 2 * 3 * d * f  # two of four experts idle
  assert sum(row["flops_per_token"] for row in counts["layers"]) + 2 * d * VOCAB == counts["flops_per_token"]


def test_flops_of_a_tiny_encoder_decoder_by_hand():
  config = tiny("seq2seq", num_layers=1, num_experts=0, activation="relu")
  config.data.length, config.data.target_length = 12, 6
  d, f, heads = 16, 24, 16
  ffn, square = 2 * 2 * d * f, 2 * d * heads
  encoder = ffn + 4 * square + 4 * heads * 12
  decoder = ffn + 4 * square + 4 * heads * 3.5 + 2 * square + 2 * square * 12 / 6 + 4 * heads * 12
  counts = describe(config, VOCAB)
  assert [row["flops_per_token"] for row in counts["layers"]] == [encoder, decoder]
  assert counts["flops_per_token"] == pytest.approx((12 * encoder + 6 * (decoder + 2 * d * VOCAB)) / 18)


def test_executed_flops_of_a_tiny_decoder_by_hand():
  """Slots are computed whether filled or not, and of a causal mask both halves."""
  d, f, heads, T, E = 16, 24, 16, 16, 4
  cases = ("einsum", 1.25, 5), ("scatter", 2.0, 8), ("scatter", 0.0, T), ("ragged", 1.25, 5)
  for dispatch, factor, C in cases:
    config = tiny(num_layers=1, moe_every=1, dispatch=dispatch, capacity_factor=factor,
                  capacity_rule="vmoe_paper")
    config.data.length = 10
    rows = 1 if dispatch == "ragged" else E * C / T
    one_hot = 2 * (2 * E * C * d) if dispatch == "einsum" else 0  # there and back
    counts = describe(config, VOCAB)
    assert counts["executed_flops"] == {
        "ffn": rows * 2 * 3 * d * f, "router": 2 * d * E, "dispatch": one_hot,
        "attention": 2 * 4 * d * heads + 2 * 2 * heads * 10, "head": 2 * d * VOCAB}
    assert counts["executed_flops_per_token"] == sum(counts["executed_flops"].values())
    total, (layer,) = counts["executed_flops_per_token"], counts["layers"]
    assert layer["executed_flops_per_token"] == total - 2 * d * VOCAB


def test_executed_flops_of_a_new_dispatch_need_its_entry_only(monkeypatch):
  """One that computes twice the rows of the list and moves them by products of E multiply-adds."""
  new = Dispatch(lambda *_: None, lambda E, k, C, T: 2 * k, one_hot_flops=lambda E, C, width: 2 * E * width)
  monkeypatch.setitem(DISPATCHES, "doubled", new)
  config = tiny(num_layers=1, moe_every=1, dispatch="ragged")
  listed = describe(config, VOCAB)["executed_flops"]
  config.model.dispatch = "doubled"
  executed = describe(config, VOCAB)["executed_flops"]
  assert executed == listed | {"ffn": 2 * listed["ffn"], "dispatch": 2 * 4 * (16 + 16)}


@pytest.mark.parametrize("name, model", [
    ("decoder", dict(dispatch="scatter", capacity_factor=3.0, router=dict(k=2))),
    ("seq2seq", dict(dispatch="einsum", capacity_factor=1.25))])
def test_executed_flops_are_those_of_the_compiled_program(name, model):
  """XLA counts norms, softmax, activations and the moving of rows too: up to 3% at these widths."""
  config = tiny(name, num_layers=1, moe_every=1, embed_dim=64, mlp_dim=128, num_heads=4, head_dim=32,
                group_size=64, **model)
  length = {"decoder": (32, None), "seq2seq": (32, 64)}[name]
  config.data.length, config.data.target_length = length
  model, batch = build(config, VOCAB), make_batch(rows=4, length=length[1] or 32, encoder_length=32)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  program = jit(lambda params, buffers, batch: model.apply(params, buffers, batch)[0]).lower(*shapes, batch)
  tokens = 4 * (32 + 64 if name == "seq2seq" else 32)
  counts = describe(config, VOCAB)
  assert 1 <= program.compile().cost_analysis()["flops"] / tokens / counts["executed_flops_per_token"] < 1.03
  assert counts["executed_flops_per_token"] > 1.1 * counts["flops_per_token"]  # so that 3% tell them apart


def test_ragged_rows_and_the_buffer_rows_that_stay_empty():
  """What executed FLOPs leave out: the CPU backend's empty reserved rows, and what fills up blocks."""
  for size_E, most in ([107, 107, 107, 108], 1.15), ([0, 300, 128, 1], 1.7):
    layout = layouts.plan_layout(jnp.array(size_E), sum(size_E))
    computed = layout.reserved * 4 + layout.block * int(slots.num_blocks(layout))
    assert sum(size_E) <= computed < most * sum(size_E)


@pytest.mark.parametrize("k", [1, 2])
def test_dense_twin_has_the_flops_and_the_shared_values(k):
  """Equal FLOPs but for the router; parameters of the same name have the same values."""
  config = tiny(expert_dim=20, router=dict(k=k))
  sparse, counts = build(config, VOCAB), describe(config, VOCAB)
  config.model.num_experts = 0
  dense, twin = build(config, VOCAB), describe(config, VOCAB)
  assert counts["flops"] | {"router": 0} == twin["flops"]
  assert [row["hidden"] for row in twin["layers"]] == [24, k * 20, 24, k * 20]

  (a, _), (b, _) = [init(model) for model in (sparse, dense)]
  for name in ("embedding", "head"):
    jax.tree.map(np.testing.assert_array_equal, a[name], b[name])
  for layer in range(4):
    left = sparse.stacks["decoder"].arrays(a["decoder"]["blocks"], layer)
    right = dense.stacks["decoder"].arrays(b["decoder"]["blocks"], layer)
    jax.tree.map(np.testing.assert_array_equal, left["attention"], right["attention"])
    if layer % 2 == 0:
      jax.tree.map(np.testing.assert_array_equal, left["ffn"], right["ffn"])
  assert np.ptp(a["decoder"]["blocks"]["0"]["0"]["attention"]["query"], axis=0).min() > 0  # layers differ


class Pair(TopKRouter):
  """Two experts per token unless told otherwise."""

  def __init__(self, d, num_experts, k=2, **kwargs):
    super().__init__(d, num_experts, k, **kwargs)


class Heir(Pair):
  """Takes what its base takes."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


@pytest.mark.parametrize("name, k, arguments", [
    ("noisy_top_k", 2, {}), ("top_k", 1, {}), ("cosine", 1, {}), ("hierarchical", 4, dict(branches=2)),
    ("permuted", 2, dict(of="noisy_top_k")), (f"{__name__}:Pair", 2, {}), (f"{__name__}:Heir", 2, {}),
    ("smear", 1, {})])
def test_dense_twin_is_as_wide_as_the_routers_own_k(name, k, arguments):
  """Whose config leaves it unset."""
  config = tiny("seq2seq", decoder=dict(num_experts=0))
  with config.model.router.unlocked():
    config.model.router.update(dict(name=name, **arguments))
  config.model.decoder.router.name = "top_k"
  found, twin = describe(config, VOCAB), describe(dense_twin(config), VOCAB)
  rows = {row["name"]: row for row in found["layers"]}
  assert [row["hidden"] for row in twin["layers"]] == [24, k * 24, 24, k * 24] + 4 * [24]
  if name != "smear":  # which merges the experts into one
    assert rows["encoder/01"]["k"] == k
    assert twin["flops"]["ffn"] == found["flops"]["ffn"]


def test_values_do_not_depend_on_the_segments():
  """Layer 2 has the same attention whether it is scanned in `[d, s] x 2` or in `[d, d, d, s]`."""
  a, b = build(tiny(), VOCAB), build(tiny(moe_layers=(3,)), VOCAB)
  assert a.stacks["decoder"].segments != b.stacks["decoder"].segments
  values = [model.stacks["decoder"].arrays(init(model)[0]["decoder"]["blocks"], 2)
            for model in (a, b)]
  jax.tree.map(np.testing.assert_array_equal, *values)
