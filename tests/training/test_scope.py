"""Losses over the whole batch: the same number and gradient for any mesh, groups and accumulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.models import build
from sparse_experts.moe import TopKRouter
from sparse_experts.moe.routing import losses
from sparse_experts.training import objectives
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.state import abstract_state, make_state
from sparse_experts.training.step import make_train_step, micro_batches
from tests.models.tiny import VOCAB, tiny
from tests.training.toy import Layer, ToyModel, toy_batch, toy_config

WEIGHTS = {"importance": 0.5, "load_balance": 0.25}
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Scoped(ToyModel):
  """With noise, so that a second pass which drew other noise would show."""

  experts: int = 8
  noise: float = 0.5
  scope: str = "batch"

  @property
  def sparse_layers(self):
    return {name: Layer(WEIGHTS, self.experts) for name in super().sparse_layers}

  def _routing(self, logit_GTE, prob_GTE, mask_GT):
    count_GE = (jax.nn.one_hot(prob_GTE.argmax(-1), self.experts) * mask_GT[..., None]).sum(1)
    return dataclasses.replace(super()._routing(logit_GTE, prob_GTE, mask_GT), losses={
        "importance": losses.importance(prob_GTE, mask_GT, self.scope),
        "load_balance": losses.load_balance(prob_GTE, count_GE, mask_GT, self.scope)})


class Probabilities(Scoped):
  """The same model; its routings hold what the definition needs."""

  def _routing(self, logit_GTE, prob_GTE, mask_GT):
    return prob_GTE[mask_GT]


def by_definition(params, batch, accumulate):
  """The auxiliary losses, from the probabilities of all real tokens; noise as of the step."""
  parts = [jax.tree.map(lambda a, i=i: a[i], micro_batches(batch, accumulate)) for i in range(accumulate)]
  key = jax.random.fold_in(KEY, 0)
  keys = [key] if accumulate == 1 else [jax.random.fold_in(key, i) for i in range(accumulate)]
  found = [Probabilities().apply(params, None, part, key)[1] for key, part in zip(keys, parts, strict=True)]
  total = 0.0
  for name in found[0]:
    prob_NE = jnp.concatenate([routings[name] for routings in found])
    sum_E = prob_NE.sum(0)
    f_E = jax.nn.one_hot(prob_NE.argmax(-1), prob_NE.shape[1]).mean(0)
    total += WEIGHTS["importance"] * sum_E.var() / sum_E.mean() ** 2 / len(found[0])
    total += WEIGHTS["load_balance"] * prob_NE.shape[1] * (f_E * prob_NE.mean(0)).sum() / len(found[0])
  return total


def step(mesh_shape, accumulate, scope="batch"):
  """(auxiliary loss, its gradient): of a step without the task's loss, from Adam's first moment."""
  model, config = Scoped(scope=scope), toy_config(accumulate=accumulate, batch_size=32)
  config.optimizer.clip_norm = 1e9
  batch = toy_batch(rows=32)
  batch["weights"] = np.zeros_like(batch["weights"])
  mesh = partitioning.make_mesh(*mesh_shape)
  with partitioning.use(mesh):
    rule = make_optimizer(config, model.axes)
    state = make_state(model, rule, 0, abstract_state(model, rule, mesh, False))
    params = jax.device_get(state.params)
    rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
    state, metrics = jax.jit(make_train_step(model, rule, config))(state, rows, KEY)
  grads = jax.tree.map(lambda mu: mu / (1 - config.optimizer.b1), jax.device_get(state.opt_state[1][0].mu))
  return params, batch, jax.device_get(metrics), grads


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("mesh", [(1, 1), (1, 8), (2, 4)], ids=str)
def test_a_loss_over_the_batch_is_its_definition(mesh, accumulate):
  """Value, gradient and what the log says; padding is uneven, and the first micro-batch is empty."""
  params, batch, metrics, grads = step(mesh, accumulate)
  value, expected = jax.value_and_grad(by_definition)(params, batch, accumulate)
  np.testing.assert_allclose(metrics["aux_loss"][0], value, rtol=1e-5)
  assert max(np.abs(g).max() for g in jax.tree.leaves(expected)) > 1e-2
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # sums in another order
  logged = {(layer, name): metrics[f"router/{layer}/{name}"] for layer in Scoped().sparse_layers
            for name in WEIGHTS}
  assert all(count == 1 for _, count in logged.values())
  mean = sum(WEIGHTS[name] * loss for (_, name), (loss, _) in logged.items()) / 2
  np.testing.assert_allclose(mean, value, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_pooled_is_one_loss_of_all_layers_tokens_per_stack(accumulate):
  """Hugging Face's: E sum_e f_e P_e of the tokens of all layers of a stack, and stacks summed."""
  E, names = 4, ("encoder/00", "decoder/00", "decoder/01")
  rng = np.random.default_rng(0)
  logit = {name: jnp.asarray(rng.normal(size=(8, 4, E)), jnp.float32) for name in names}
  mask_GT = jnp.asarray(rng.random((8, 4)) < 0.7).at[:2].set(False)
  router = TopKRouter(4, E, 2, balance_count="multi_hot", scope="batch", rngs=nnx.Rngs(0))
  weights = {name: {"load_balance": 0.02, "z": 0.001} for name in names}

  def sums(logit, at=slice(None)):
    layers = {name: {"losses": router.route(logit[name][at], mask_GT[at]).losses} for name in names}
    return {"loss": (jnp.zeros(()), jnp.ones(())), "layers": layers}

  def ours(logit):
    over = objectives.whole(sums(logit))
    parts = [slice(i, i + 8 // accumulate) for i in range(0, 8, 8 // accumulate)]
    return sum(objectives.total(sums(logit, at), over, weights, dict.fromkeys(weights, "pooled"))[1]
               for at in parts)

  def hugging_face(logit):
    total = 0.0
    for stack in ("encoder", "decoder"):
      logit_NE = jnp.concatenate([logit[name][mask_GT] for name in names if name.startswith(stack)])
      chosen_NK = jax.lax.top_k(logit_NE, 2)[1]
      f_E = jax.nn.one_hot(chosen_NK, E).sum(1).mean(0)
      total += 0.02 * E * (f_E * jax.nn.softmax(logit_NE).mean(0)).sum()
      total += 0.001 * (jax.nn.logsumexp(logit_NE, -1) ** 2).mean()
    return total

  (value, grads), (expected, slopes) = (jax.value_and_grad(f)(logit) for f in (ours, hugging_face))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for name in names:
    np.testing.assert_allclose(grads[name], slopes[name], rtol=1e-4, atol=1e-8)
  _, alone = objectives.total(
      sums(logit), objectives.whole(sums(logit)), weights, dict.fromkeys(weights, "sum"))
  assert abs(alone - expected) > 1e-3, "two layers of a stack must differ from one of both"


def test_what_cannot_be_pooled_is_refused():
  def model(**router):
    config = tiny(router=dict(k=2, **router))
    return build(config, VOCAB)

  objectives.check_pooled(model(scope="batch"))
  with pytest.raises(UserError, match="TopKRouter of decoder/01 has losses .*; set model.router.scope"):
    objectives.check_pooled(model())
  with pytest.raises(UserError, match="DeepSeekV3Router of decoder/01 .*; choose train.layer_losses=mean"):
    objectives.check_pooled(model(name="deepseek_v3"))


def test_groups_are_another_loss():
  """What the test above must be able to tell: eight tokens vary more than all of the batch's."""
  params, batch, metrics, _ = step((1, 1), 1, scope="group")
  assert metrics["aux_loss"][0] > 1.1 * by_definition(params, batch, 1)


def test_a_batch_without_tokens_has_no_loss():
  """Zero, and zero gradient, where nothing is real."""
  mask_GT = jnp.zeros((2, 3), bool)
  of = lambda prob: losses.importance(prob, mask_GT, "batch").pair()[0]
  value, grad = jax.value_and_grad(of)(jnp.full((2, 3, 4), jnp.nan))
  assert value == 0 and not np.asarray(grad).any()
