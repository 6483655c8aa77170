# %% [markdown]
# # Write your own router and compare it with Switch
#
# After this notebook you can write a router in one cell, have it checked, train it, trace it, and say with
# an interval whether it is better than Switch.

# %%
import logging

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from IPython.display import Markdown

import sparse_experts
from sparse_experts.analysis import compare, probe, trace
from sparse_experts.analysis.table import aligned
from sparse_experts.errors import UserError
from sparse_experts.moe import Router, Routing, check_router, router_metrics
from sparse_experts.report import pictures, plots

logging.getLogger("absl").setLevel(logging.ERROR)  # the library that writes checkpoints says much

# %% [markdown]
# ## The router, in one cell
#
# A router gets the tokens' vectors and what else is known of them, and returns a list of assignments:
# token, expert, gate. It knows no buffers and no devices. This one compares a token with a point for each
# expert and takes the nearest. The gate is a softmax of negative squared distances.

# %%
class NearestPoint(Router):
  """Each token goes to the expert whose point is nearest."""

  def __init__(self, d, num_experts, rngs):
    self.num_experts, self.causality, self.drop_causality = num_experts, "self", "past"
    self.point_ED = nnx.Param(jax.random.normal(rngs.params(), (num_experts, d)), axes=("router", "embed"))

  def __call__(self, x_GTD, tokens, capacity, key=None):
    x_GT1D = x_GTD.astype(jnp.float32)[:, :, None]
    prob_GTE = jax.nn.softmax(-((x_GT1D - self.point_ED[...]) ** 2).mean(-1) * 8)
    expert_GT = prob_GTE.argmax(-1).astype(jnp.int32)
    place_GT = jnp.broadcast_to(jnp.arange(expert_GT.shape[1], dtype=jnp.int32), expert_GT.shape)
    return Routing(
        token=place_GT, expert=expert_GT, gate=prob_GTE.max(-1), valid=tokens.mask, rows_per_token=1,
        prob=prob_GTE,
        metrics=router_metrics(expert_GT, tokens.mask, prob_GTE, tokens.mask, self.num_experts))

# %% [markdown]
# ## Check it
#
# `check_router` runs it on small batches. It says in one line what is wrong: shapes, types, tokens listed
# twice, gradients that are not finite, a causality that is not true. `train` calls it first.

# %%
config = sparse_experts.config.default_config()
config.model.num_layers, config.model.embed_dim, config.model.num_heads, config.model.head_dim = 2, 64, 2, 32
config.model.mlp_dim, config.model.num_experts, config.model.group_size, config.data.length = 128, 8, 128, 128
config.model.capacity_factor, config.model.eval_capacity_factor = 1.25, 2.0
config.train.steps, config.train.batch_size, config.optimizer.learning_rate = 100, 8, 5e-3
config.train.log_every, config.train.eval_every, config.train.checkpoint_every = 10, 100, 100
config.eval.min_bytes, config.eval.train_windows = 50_000, 64
check_router(NearestPoint(config.model.embed_dim, 8, nnx.Rngs(0)), config.model.embed_dim)

# %% [markdown]
# And this is how a mistake looks: a router that says a token's choice depends on the token alone, but looks
# at the mean of the group.

# %%
class Wrong(NearestPoint):
  def __call__(self, x_GTD, tokens, capacity, key=None):
    return super().__call__(x_GTD - x_GTD.mean(1, keepdims=True), tokens, capacity, key)


try:
  check_router(Wrong(config.model.embed_dim, 8, nnx.Rngs(0)), config.model.embed_dim)
except UserError as error:
  print(error)

# %% [markdown]
# ## Train it, and Switch, on the same seeds
#
# A seed decides the initial weights and the order of the data, so runs of equal seed are pairs. A router that
# you pass brings its own weights: make one for each seed. The default router of a config is Switch's.

# %%
for seed in range(3):
  config.train.seed = seed
  router = NearestPoint(config.model.embed_dim, 8, nnx.Rngs(seed))
  sparse_experts.train(config, workdir=f"runs/nearest/{seed}", router=router)
  sparse_experts.train(config, workdir=f"runs/switch/{seed}")

# %% [markdown]
# ## Compare
#
# The interval is that of the paired differences over seeds. If it holds zero, these runs do not say which
# is better.

# %%
nearest, switch = map(compare.read_group, ("runs/nearest", "runs/switch"))
print(compare.report(nearest, switch))

# %%
pictures.compared(nearest, switch)

# %% [markdown]
# ## Look at what it does
#
# A loss says little about a router. Load of its experts, for the same tokens, next to Switch's:

# %%
runs = {"nearest": sparse_experts.load("runs/nearest/0", router=router),
        "switch": sparse_experts.load("runs/switch/0")}
traced = {name: trace.trace(run, probe.probe(run, 64)) for name, run in runs.items()}
share = {name: np.bincount(of["expert"], minlength=8) / len(of["expert"]) for name, of in traced.items()}
picture, (axes,) = plots.panels("A", 7, 2.6, arms=share)
plots.bars(axes, share, range(8), "share of the tokens")
axes.set_xlabel("expert")
plots.legend(picture, lines=False)
picture

# %%
Markdown(aligned([["router", "MaxVio", "dead experts", "mean gate", "nats per byte of the sampled tokens"], *(
    [name, f"{8 * of.max() - 1:.2f}", str((of < 1 / 80).sum()), f"{traced[name]['gate'].mean():.2f}",
     f"{np.nanmean(traced[name]['token_loss']):.3f}"] for name, of in share.items())]))

# %% [markdown]
# Where two or three experts hold most of the tokens, the layer is hardly larger than a dense one, and so
# short a run need not show it in the loss: that is why balance stands next to every figure. This router has
# no load-balancing loss. Add one: put `losses={"load_balance": ...}` into its `Routing`
# (`sparse_experts.moe.routing.losses.load_balance`) and `self.loss_weights = {"load_balance": 0.01}` into
# its constructor, then run the notebook again.
#
# To use it in a config, save it in a module: `--config.model.router.name=my_module:NearestPoint`. To add it
# to the package, follow "Add a router" in CONTRIBUTING.md.
