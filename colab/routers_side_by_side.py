# %% [markdown]
# # See how a dozen routers treat the same batch
#
# After this notebook you can read off, for any router, who goes where, what is dropped and what its losses
# say, and you know which of these differ between families of routers.
#
# `python -m sparse_experts describe --routers` lists all routers; their docstrings have the papers'
# equations.

# %%
import jax
import numpy as np
from flax import nnx
from IPython.display import Markdown

from sparse_experts.analysis.table import aligned
from sparse_experts.moe import Experts, MoELayer, Tokens, make_router
from sparse_experts.moe.routing import as_pair
from sparse_experts.report import plots

# %% [markdown]
# ## One batch
#
# Two groups of 48 tokens. A token is a character, its vector a row of a random table. Some routers look at
# the token's number instead of its vector, so that goes along.

# %%
text = "who goes where, what is dropped, and what do losses say? a token is a character, equal ones alike ..."
G, T, D, E = 2, 48, 32, 8
id_GT = np.frombuffer(text.encode(), np.uint8)[:G * T].reshape(G, T).astype(np.int32)
x_GTD = 8 * np.random.default_rng(0).normal(size=(128, D)).astype(np.float32)[id_GT]
tokens = Tokens(mask=np.ones((G, T), bool), id=id_GT)

# %% [markdown]
# ## A dozen routers
#
# A name of the table of routers, and arguments. None is trained: weights are as at the first step of a run.

# %%
ROUTERS = {
  "Switch": ("top_k", {}),
  "top 2": ("top_k", dict(k=2, gate="renormalized")),
  "batch priority": ("top_k", dict(order="batch_priority")),
  "no token left behind": ("no_token_left_behind", {}),
  "noisy top 2": ("noisy_top_k", dict(k=2)),
  "V-MoE": ("v_moe", dict(k=2)),
  "DeepSeek-V3": ("deepseek_v3", dict(k=2)),
  "cosine": ("cosine", {}),
  "expert choice": ("expert_choice", {}),
  "BASE": ("base", {}),
  "Sinkhorn": ("sinkhorn", {}),
  "hash": ("hash", {}),
}
experts = Experts(E, D, 32, rngs=nnx.Rngs(0))
routers = {name: make_router(router, D, E, rngs=nnx.Rngs(1), **arguments)
           for name, (router, arguments) in ROUTERS.items()}
layers = {name: MoELayer(router, experts, capacity_factor=1.0, capacity_rule="megablocks")  # counts k
          for name, router in routers.items()}
routings = {name: layer(x_GTD, tokens, jax.random.key(0))[1] for name, layer in layers.items()}

# %% [markdown]
# ## Who goes where
#
# The first group. A column is a token, a row an expert. A dot is an assignment with a slot, a cross one
# without: it is dropped. Every layer has just enough slots for an even load (capacity factor 1).

# %%
picture, panels = plots.panels("ABC;DEF;GHI;JKL", 10, 8.6)
for axes, (name, routing) in zip(panels, routings.items()):
  plots.routes(axes, routing, E)
  plots.title(axes, name)
picture

# %% [markdown]
# Look for these:
#
# - *Switch*: crosses stand at the right, since slots are given out from left to right. With *batch
#   priority* they stand where the router was least sure.
# - *no token left behind*: a token whose expert is full asks its next choices. It is dropped if its first
#   four are full.
# - *expert choice*: experts choose tokens. Each takes as many as it has slots for, so a token may get
#   several experts or none.
# - *BASE* and *Sinkhorn* balance all tokens of a group together, so a choice depends on later tokens too. A
#   causal decoder refuses them, and expert choice.
# - *hash*: the token's number decides, nothing is learnt.
#
# ## The same in numbers
#
# *MaxVio* is the busiest expert's load over the mean, minus 1. *Alone* are tokens that no expert serves.
# *Depends on* is what a token's output may depend on. The loss is what the router adds to the training
# loss, coefficient included.

# %%
def number(loss):
  total, count = as_pair(loss)
  return float(total / count)


def row(name, routing):
  mean = {key: np.asarray(total / count) for key, (total, count) in routing.metrics.items()}
  weights = layers[name].loss_weights
  losses = {key: weights[key] * number(loss) for key, loss in routing.losses.items() if weights[key]}
  return [name, f"{mean['experts_per_token']:.1f}", f"{mean['load'].max() / mean['load'].mean() - 1:.2f}",
          f"{mean['dropped']:.0%}", f"{mean['token_dropped']:.0%}", layers[name].causality,
          ", ".join(f"{key} {value:.4f}" for key, value in losses.items()) or "none"]


head = ["router", "experts per token", "MaxVio", "dropped", "alone", "depends on", "loss"]
Markdown(aligned([head, *(row(name, routing) for name, routing in routings.items())]))

# %% [markdown]
# ## What happens when tokens look alike
#
# Now the same vector is added to every token, more and more of it. A router of scores then prefers the same
# experts for all tokens. Its losses should say so, and grow.

# %%
shift_D = np.random.default_rng(1).normal(size=D).astype(np.float32)
amounts = np.linspace(0, 24, 7, dtype=np.float32)
ARMS = ("Switch", "V-MoE", "DeepSeek-V3", "Sinkhorn", "hash")
found = {name: [layers[name](x_GTD + amount * shift_D, tokens, jax.random.key(0))[1] for amount in amounts]
         for name in ARMS}

# %%
dropped = lambda r: float(r.metrics["dropped"][0] / r.metrics["dropped"][1])
added = lambda name, r: sum(layers[name].loss_weights[key] * number(loss) for key, loss in r.losses.items())
picture, (left, right) = plots.panels("AB", 10, 3.6, arms=ARMS)
plots.curves(left, {name: {0: (amounts, [dropped(r) for r in of])} for name, of in found.items()},
             "how much is added to every token", "share of assignments dropped")
plots.curves(right, {name: {0: (amounts, [added(name, r) for r in of])} for name, of in found.items()},
             "how much is added to every token", "losses times coefficients")
plots.legend(picture)
picture

# %% [markdown]
# What Sinkhorn and hashing drop does not change: one removes from the scores what all tokens share, the
# other does not look at vectors. Neither has a loss. DeepSeek-V3 adds hardly any loss: a bias per expert
# moves after each step instead (`Router.next_state`), which one batch cannot show.
#
# Which of them trains best is another question: `experiments/routers_side_by_side` answers it over five
# seeds each. Next: experts on eight devices, in `expert_parallelism`.
