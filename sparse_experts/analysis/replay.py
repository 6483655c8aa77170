"""Replays a batch with another router, capacity, dispatch or published convention, without training."""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sparse_experts import partitioning
from sparse_experts.analysis.probe import parts, sparse_layers
from sparse_experts.analysis.trace import token_loss
from sparse_experts.config import FACTOR_KEYS, default_config, seeds
from sparse_experts.errors import UserError, nearest
from sparse_experts.models import Batch, Buffers, Model, Params, build
from sparse_experts.models.names import by_path, places
from sparse_experts.moe import Router, Routing
from sparse_experts.moe.routing import as_pair
from sparse_experts.tasks import task_of
from sparse_experts.training.metrics import add
from sparse_experts.training.run import Run

# Values of `config.model` in published systems, of the keys that affect a forward pass without noise and its
# balance loss. A key that is not listed (such as k in a codebase for any k) keeps the run's value.
CONVENTIONS: dict[str, dict[str, Any]] = {
    # Fedus et al. 2021, section 2; Mesh-TensorFlow's transformer/moe.py: capacity truncated, at least 4.
    "switch": {"router.k": 1, "router.gate": "raw", "router.order": "choice", "router.balance_count": "first",
               "capacity_rule": "mesh", "capacity_factor": 1.25},
    # Lepikhin et al. 2020; Lingvo's gshard_layers.py: gates renormalised before drops, 2 S / E slots.
    "gshard": {"router.k": 2, "router.gate": "renormalized", "router.order": "choice",
               "router.balance_count": "first", "capacity_rule": "lingvo", "capacity_factor": 2.0},
    # Zoph et al. 2022, section 3 and Mesh-TensorFlow's top-2: slots per token, not per choice.
    "st_moe": {"router.k": 2, "router.gate": "renormalized", "router.order": "choice",
               "router.balance_count": "first", "capacity_rule": "mesh", "capacity_factor": 1.25},
    # Riquelme et al. 2021 and vmoe/nn/routing.py, without batch priority, as it trains. It has other
    # balance losses (importance and load): the run's count is kept.
    "v_moe": {"router.k": 2, "router.gate": "raw", "router.order": "choice", "capacity_rule": "vmoe",
              "capacity_factor": 1.05},
    # Jiang et al. 2024; Hugging Face's modeling_mixtral.py: dropless, softmax over the 2 chosen logits.
    "mixtral": {"router.k": 2, "router.gate": "renormalized", "router.order": "choice",
                "router.balance_count": "multi_hot", "capacity_factor": 0.0},
    # Muennighoff et al. 2024, trained through MegaBlocks: dropless, 8 raw probabilities.
    "olmoe": {"router.k": 8, "router.gate": "raw", "router.order": "choice",
              "router.balance_count": "assignments", "capacity_factor": 0.0},
    # Flaxformer's architectures/moe/routing.py: raw gates for every k, all k choices counted.
    "flaxformer": {"router.gate": "raw", "router.order": "choice", "router.balance_count": "multi_hot",
                   "capacity_rule": "flaxformer"},
    # MaxText's layers/moe.py with a capacity factor: a token claims all its slots before the next.
    "maxtext": {"router.gate": "renormalized", "router.order": "token", "router.balance_count": "assignments",
                "capacity_rule": "maxtext"},
}


def replay(run: Run, batch: Batch, *, router: Router | str | None = None, convention: str | None = None,
           capacity_factor: float | None = None, dispatch: str | None = None) -> dict[str, Any]:
  """Runs the batch through the run's model with another routing and with its own, both as in training
  (with its capacity) but without noise.

  router: a name of `config.model.router.name`, with that router's default arguments and own capacity, or an
    instance, with the run's capacity.
  convention: a key of CONVENTIONS; arguments below take precedence.
  capacity_factor: 0 for dropless. dispatch: a name in `moe.DISPATCHES`.

  Parameters are the run's if names and shapes agree, also those of a router instance; others (of a router
  with other weights) have their own initial values and are listed in `fresh`.

    loss, original_loss       nats per target
    agreement                 share of tokens, over all sparse layers, for which both routers choose the same
                              set of experts, before drops. Later layers see the effect of earlier ones
    dropped, token_dropped    assignments that got no slot; tokens that no expert served
    fresh                     names of parameters that the run does not have
    router/<layer>/...        each layer's agreement, losses and metrics, load_max_mean for the load
  """
  if not (task := task_of(run.config)).token_targets:
    raise UserError(f"the model reads {task.items}, and replay compares losses of tokens of text; evaluate "
                    "it with another capacity instead, --config.model.eval_capacity_factor=0.5")
  config = _changed(run.config, router, convention, capacity_factor, dispatch)
  if router is None and convention is None:
    router = run.router
  other = build(config, run.tokenizer.vocab_size, "train", router=None if isinstance(router, str) else router)
  own = run.abstract_model("train")
  layers = sparse_layers(own)
  sparse_layers(other)
  params, buffers, fresh = _shared(run, other)

  def compare(own_params, own_buffers, params, buffers, part):
    own_BLV, before = own.apply(own_params, own_buffers, part, trace=True)
    other_BLV, after = other.apply(params, buffers, part, trace=True)
    pairs = {"original_loss": _loss(own_BLV, part), "loss": _loss(other_BLV, part)}
    for name, layer in layers.items():
      same = _agreement(before[name], after[name], task.routed(name, part).segment_BL > 0, layer)
      stats = after[name].losses | after[name].metrics | {"agreement": same}
      pairs |= {f"router/{name}/{key}": as_pair(pair) for key, pair in stats.items()}
    return pairs

  compare = jax.jit(compare, out_shardings=partitioning.replicated(run.mesh))
  totals: dict[str, Any] = {}
  for _, part in parts(run, own, batch):
    with partitioning.use(run.mesh):
      pairs = jax.device_get(compare(run.params, run.buffers, params, buffers, part))
    totals = add(totals, jax.tree.map(lambda x: np.asarray(x, np.float64), pairs))
  return _numbers(totals, layers) | {"fresh": fresh}


def _changed(config: ConfigDict, router: Router | str | None, convention: str | None,
             capacity_factor: float | None, dispatch: str | None) -> ConfigDict:
  """The run's config with another routing in all its stacks."""
  changes: dict[str, Any] = {}
  if convention is not None:
    if convention not in CONVENTIONS:
      raise UserError(f"convention='{convention}' is unknown{nearest(convention, CONVENTIONS)}")
    if router is not None:
      raise UserError(f"convention='{convention}' says which router; leave out router={router!r}")
    changes |= CONVENTIONS[convention]
  if isinstance(router, str):
    changes |= {"router.name": router} | dict.fromkeys(FACTOR_KEYS)
  changes |= {name: value for name, value in (
      ("capacity_factor", capacity_factor), ("dispatch", dispatch)) if value is not None}
  if "capacity_rule" in changes:
    changes["min_capacity"] = None  # the rule's own
  if not changes.keys().isdisjoint(FACTOR_KEYS):
    changes["capacity_slots"] = None
  config = copy.deepcopy(config).unlock()  # ConfigDict(config) would share its sections
  model = config.model
  if isinstance(router, str) or (convention is not None and model.router.name != "top_k"):
    model.router = default_config().model.router  # arguments of another class do not apply
    model.decoder.router = default_config().model.decoder.router
  model.update_from_flattened_dict(changes)
  model.decoder.update_from_flattened_dict(dict.fromkeys(changes))  # None: as the encoder
  return config.lock()


def _shared(run: Run, model: Model) -> tuple[Params, Buffers, list[str]]:
  """(params, buffers) of `model` with the run's arrays where they fit, and names of those that do not fit."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  theirs = by_path((run.params, run.buffers))
  fits = {path: path in theirs and theirs[path].shape == x.shape for path, x in by_path(shapes).items()}
  fresh = [name for i, tree in zip("01", shapes) for name, at in places(tree, shapes[0]).items()
           if not fits[i, *at.path]]
  values = shapes
  if fresh:
    where = (partitioning.shardings(model.axes, run.mesh, run.config.mesh.fsdp),
             jax.tree.map(lambda _: partitioning.replicated(run.mesh), shapes[1]))
    values = jax.jit(model.init, out_shardings=where)(jax.random.key(seeds(run.config)["init"]))
  leaves = [theirs[path] if fits[path] else x for path, x in by_path(values).items()]
  return (*jax.tree.unflatten(jax.tree.structure(values), leaves), fresh)


def _loss(logits_BLV, part):
  wanted_BL = part["weights"] > 0
  return jnp.where(wanted_BL, token_loss(logits_BLV, part), 0.0).sum(), wanted_BL.sum()


def _agreement(before: Routing, after: Routing, mask_BL, layer) -> tuple[jax.Array, jax.Array]:
  """(real tokens whose experts are the same set, real tokens)."""
  T = layer.group_length(mask_BL.size)
  mask_GT = jnp.pad(mask_BL.reshape(-1), (0, -mask_BL.size % T)).reshape(-1, T)
  mask_GT = jnp.repeat(mask_GT, layer.num_heads, axis=1)  # routers see sub-tokens

  def experts(routing):
    group_G1 = jnp.arange(routing.token.shape[0])[:, None]
    none_GTE = jnp.zeros((*mask_GT.shape, layer.num_experts), bool)
    return none_GTE.at[group_G1, routing.token, routing.expert].max(routing.valid)

  same_GT = (experts(before) == experts(after)).all(-1)
  return (same_GT & mask_GT).sum(), mask_GT.sum()


def _numbers(totals: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, float]:
  numbers = {}
  for key, (total, count) in totals.items():
    if key.endswith("/load"):
      numbers[f"{key}_max_mean"] = float(total.max() / total.mean())
    elif count > 0 and total.ndim == 0:
      numbers[key] = float(total / count)
  for measure in ("agreement", "dropped", "token_dropped"):
    pairs = [totals[f"router/{name}/{measure}"] for name in layers]
    numbers[measure] = float(sum(s for s, _ in pairs) / sum(n for _, n in pairs))
  first = ("loss", "original_loss", "agreement", "dropped", "token_dropped")
  return {name: numbers.pop(name) for name in first} | numbers
