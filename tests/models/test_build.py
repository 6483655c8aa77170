import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.models import PHASES, build
from sparse_experts.moe import TopKRouter
from tests.models.tiny import VOCAB, init, jit, make_batch, tiny


class FutureRouter(TopKRouter):
  """Top-k that claims to look ahead."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.causality = "sequence"


class CountingRouter(TopKRouter):
  """Counts what each expert was sent; the count is state, not a parameter."""

  def __init__(self, d, num_experts, **kwargs):
    super().__init__(d, num_experts, **kwargs)
    self.count_E = nnx.Variable(jnp.zeros(num_experts))

  def next_state(self, state, params, metrics, stats):
    return {"count_E": state["count_E"] + metrics["load"][0]}


@pytest.mark.parametrize("words, model", [
    (("k=5", "num_experts=4"), dict(router=dict(k=5))),
    (("router.name='topk'", "top_k"), dict(router=dict(name="topk"))),
    (("batch_priority", "model.router", "decoder/01"), dict(router=dict(order="batch_priority"))),
    (("FutureRouter", "model.router.name", "sequence"), dict(router=dict(name=f"{__name__}:FutureRouter"))),
    (("model.attention.kv_rank", "'multi_head'", "bias"), dict(attention=dict(kv_rank=4))),
    (("model.attention.qk_norm", "'latent'"), dict(attention=dict(name="latent", qk_norm="head"))),
    (("rope_dim=8", "head_dim=8"), dict(attention=dict(name="latent", rope_dim=8))),
    (("seq2seq", "model.attention.name=multi_head"), dict(name="seq2seq", attention=dict(name="latent"))),
])
def test_a_mistake_is_named_with_its_way_out(words, model):
  with pytest.raises(UserError) as error:
    build(tiny(**({"name": "decoder"} | model)), VOCAB)
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_an_unknown_phase_is_refused():
  with pytest.raises(UserError, match="did you mean 'dropless'"):
    build(tiny(), VOCAB, "droples")


def test_encoder_and_decoder_have_their_own_routing():
  """An encoder may see the future when the decoder's override does not."""
  config = tiny("seq2seq", moe_layers=(3,), router=dict(order="batch_priority", k=2))
  with pytest.raises(UserError, match=r"model\.decoder\.router\.name='top_k' with order='batch_priority'"):
    build(config, VOCAB)
  config.model.decoder.update(dict(num_experts=2, moe_layers=(0, 1), capacity_factor=2.0, group_size=8))
  config.model.decoder.router.update(dict(order="choice", k=1))
  layers = build(config, VOCAB).sparse_layers
  assert list(layers) == ["encoder/03", "decoder/00", "decoder/01"]
  assert [(x.num_experts, x.k, x.group_size, x.capacity) for x in layers.values()] == [
      (4, 2, 16, None), (2, 1, 8, 8), (2, 1, 8, 8)]
  assert layers["encoder/03"].causality == "batch" and layers["decoder/00"].causality == "past"
  config.model.decoder.num_experts = 0
  assert list(build(config, VOCAB).sparse_layers) == ["encoder/03"]


def test_phases_share_parameters_and_differ_in_capacity():
  config = tiny(capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=1, dispatch="scatter")
  models = {phase: build(config, VOCAB, phase) for phase in PHASES}
  shapes = [jax.eval_shape(m.init, jax.random.key(0)) for m in models.values()]
  assert shapes[0] == shapes[1] == shapes[2]
  assert [m.sparse_layers["decoder/01"].capacity for m in models.values()] == [4, 8, None]
  assert models["train"].axes == models["dropless"].axes


def test_axes_name_each_dimension_of_each_parameter():
  size = dict(layers=2, embed=16, mlp=24, heads=5, head=8, vocab=VOCAB, expert=4, router=4, buckets=32)
  for name in ("decoder", "seq2seq"):
    model = build(tiny(name, num_heads=5), VOCAB)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    partitioning.check_ranks(model.axes, params)
    named = jax.tree.map(
        lambda axes: tuple(size[a] for a in axes), model.axes, is_leaf=partitioning.is_axes)
    assert named == jax.tree.map(lambda a: a.shape, params)
    experts = model.axes["decoder"]["blocks"]["0"]["1"]["ffn"]["experts"]
    assert experts["w_in"] == ("layers", "expert", "embed", "mlp")


def test_router_state_is_a_buffer_that_moves_once_per_step():
  model = build(tiny(router=dict(name=f"{__name__}:CountingRouter")), VOCAB)
  params, buffers = init(model)
  assert "count_E" not in params["decoder"]["blocks"]["0"]["1"]["ffn"]["router"]
  batch = make_batch()
  _, routings = jit(model.apply)(params, buffers, batch)
  assert list(routings) == ["decoder/01", "decoder/03"] and routings["decoder/01"].token is None
  sums = {name: {"metrics": r.metrics, "stats": r.stats} for name, r in routings.items()}
  new = model.next_buffers(params, model.next_buffers(params, buffers, sums), sums)
  count = new["decoder"]["blocks"]["0"]["1"]["ffn"]["router"]["count_E"]
  np.testing.assert_array_equal(count, 2 * np.stack([s["metrics"]["load"][0] for s in sums.values()]))
  assert int(count.sum()) == 2 * 2 * (batch["segments"] > 0).sum()


def test_a_given_router_stands_in_every_sparse_layer():
  router = TopKRouter(16, 4, k=2, rngs=nnx.Rngs(0))
  model = build(tiny(), VOCAB, router=router)
  params, _ = init(model)
  for layer in (1, 3):
    arrays = model.stacks["decoder"].arrays(params["decoder"]["blocks"], layer)
    np.testing.assert_array_equal(arrays["ffn"]["router"]["w"], router.w[...])
  assert model.sparse_layers["decoder/01"].k == 2


def test_a_decoder_with_another_router_does_not_get_the_encoders_arguments():
  config = tiny(name="seq2seq", num_layers=2)
  with config.model.router.unlocked():
    config.model.router.update(name="tests.models.test_build:Warm", warmth=2.0)
  config.model.decoder.router.name = "top_k"
  model = build(config, VOCAB)
  assert model.sparse_layers["encoder/01"].router.warmth == 2.0
  assert type(model.sparse_layers["decoder/01"].router) is TopKRouter


class Warm(TopKRouter):
  """A router with an argument of its own."""

  def __init__(self, d, num_experts, *, warmth, rngs):
    super().__init__(d, num_experts, rngs=rngs)
    self.warmth = warmth
