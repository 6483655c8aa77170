# %% [markdown]
# # Build a sparse layer by hand
#
# After this notebook you can say what each of the four parts of a sparse layer does, check the layer with
# two loops of NumPy, and put it into a model and a training loop of your own.
#
# | part | decides |
# |---|---|
# | `Router` | which experts a token goes to, and with which weight (its *gate*) |
# | `Routing` | nothing: it is the list of these assignments, in the order in which they claim slots |
# | `Dispatch` | who gets a slot, and how rows move to the experts and back |
# | `Experts` | what becomes of a row: each expert is a small feed-forward network |
#
# Axes of arrays are letters at the end of names: `G` groups of `T` tokens that are `D` wide, `E` experts,
# `A` assignments.

# %%
import numpy as np
from flax import nnx
from IPython.display import Markdown

from sparse_experts.analysis.table import aligned
from sparse_experts.moe import Experts, MoELayer, Tokens, TopKRouter
from sparse_experts.report import plots

# %% [markdown]
# ## Make tokens
#
# One group: a sentence, a token for each character. A token's vector is a row of a random table, so equal
# characters are equal vectors.

# %%
sentence = "a router sends each token to an expert"
D, E = 16, 4
table_VD = np.random.default_rng(0).normal(size=(128, D)).astype(np.float32)
x_GTD = table_VD[np.frombuffer(sentence.encode(), np.uint8)][None]
x_GTD.shape

# %% [markdown]
# ## Router: score each token against the experts
#
# The router multiplies a token by a matrix with a column for each expert. A softmax makes probabilities of
# the scores. It takes the largest `k`. Here `k=1`, as in Switch.

# %%
router = TopKRouter(D, E, k=1, rngs=nnx.Rngs(1))
router.w[...] *= 15  # as after some training: at the start all experts are about equally probable
routing = router(x_GTD, Tokens(mask=np.ones(x_GTD.shape[:2], bool)), capacity=None)

picture, (axes,) = plots.panels("A", 9, 2.2)
plots.heat(axes, np.asarray(routing.prob[0]).T, range(E), "token", "probability")
axes.set_xticks(range(len(sentence)), sentence)
axes.set_ylabel("expert")
picture

# %% [markdown]
# Columns of equal characters are equal: this router sees the token and nothing else. In a Transformer
# attention has mixed the context into the vector before.
#
# ## Routing: the list of assignments
#
# The router's result is a list. It knows no buffer and no device. Its order is priority: who stands first
# claims a slot first.

# %%
first = [[repr(sentence[t]), str(t), str(e), f"{g:.3f}"] for t, e, g in zip(
    routing.token[0, :8], routing.expert[0, :8], routing.gate[0, :8])]
Markdown(aligned([["character", "token", "expert", "gate"], *first]))

# %% [markdown]
# ## Dispatch: give out slots, drop the rest
#
# An accelerator wants buffers of a fixed size. So each expert has a number of slots, its *capacity*: the
# capacity factor times an even share of the tokens. A token that comes too late is *dropped*: this layer
# adds nothing to it.

# %%
layer = MoELayer(router, Experts(E, D, 32, "relu", init_scale=1.0, rngs=nnx.Rngs(2)), dispatch="scatter",
                 capacity_factor=1.0)
y_GTD, routing = layer(x_GTD)
slots = layer.capacity(len(sentence))
load_E = np.bincount(routing.expert[0], minlength=E)
print(f"{len(sentence)} tokens, {E} experts, {slots} slots each; "
      f"{int((~routing.kept).sum())} tokens are dropped")

# %%
picture, (where, load) = plots.panels("AAAB", 9, 2.6)
plots.routes(where, routing, E)
where.set_xticks(range(len(sentence)), sentence)
plots.title(where, "dot: the token got a slot; cross: dropped")
plots.bars(load, {"tokens": load_E}, range(E), "tokens that chose it")
load.axhline(slots, color="0.35", lw=1)
load.set_xlabel("expert")
plots.title(load, "line: slots of an expert")
picture

# %% [markdown]
# In each row of the left panel the crosses come last: the list is served in order. *Batch priority* would
# serve the largest gates first: `TopKRouter(..., order="batch_priority")`.
#
# There are three dispatches. They lay rows out differently and give the same result:

# %%
for name in ("einsum", "scatter", "ragged"):
  layer.dispatch = name
  other_GTD, _ = layer(x_GTD)
  print(f"{name:8} largest difference {np.abs(other_GTD - y_GTD).max():.1e}")

# %% [markdown]
# ## Experts: E networks with weights of their own
#
# Their weights are stacked along a first axis. `batched` runs all of them at once, on `C` rows each.

# %%
experts = layer.experts
print("w_in", experts.w_in.shape, " w_out", experts.w_out.shape)
experts.batched(np.zeros((E, slots, D), np.float32)).shape

# %% [markdown]
# ## Check the layer with two loops
#
# All of it in NumPy: count who has claimed a slot, and add gate times expert.

# %%
w_in_EDF, w_out_EFD = np.asarray(experts.w_in[...]), np.asarray(experts.w_out[...])
by_hand_GTD = np.zeros_like(x_GTD)
for g in range(x_GTD.shape[0]):
  claimed_E = np.zeros(E, int)
  for t, e, gate in zip(routing.token[g], routing.expert[g], routing.gate[g]):
    if claimed_E[e] < slots:
      by_hand_GTD[g, t] += gate * np.maximum(x_GTD[g, t] @ w_in_EDF[e], 0) @ w_out_EFD[e]
    claimed_E[e] += 1
np.testing.assert_allclose(y_GTD, by_hand_GTD, atol=1e-4)
print(f"largest difference {np.abs(y_GTD - by_hand_GTD).max():.1e}, of values up to {y_GTD.max():.1f}")

# %% [markdown]
# ## What the layer reports
#
# Losses and metrics are pairs (sum, count), so that they can be added over devices and steps and divided
# last. The load-balancing loss is 1 when all experts get the same share.

# %%
pairs = routing.losses | routing.metrics
shown = lambda pair: np.array2string(np.asarray(pair[0] / pair[1]), precision=3)
Markdown(aligned([["name", "value"], *([name, shown(pair)] for name, pair in pairs.items())]))

# %% [markdown]
# ## Train it in a model of your own
#
# The layer is a plain flax module. This model and its loop use flax and optax only. The task needs
# different functions for different tokens: which of four linear maps makes the target depends on the signs
# of two inputs.

# %%
import optax


class Mine(nnx.Module):
  def __init__(self, rngs):
    self.inner, self.out = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
    self.moe = MoELayer(TopKRouter(16, 4, rngs=rngs), Experts(4, 16, 32, "relu", rngs=rngs))

  def loss(self, x_BLD, target_BL1):
    y_BLD, routing = self.moe(self.inner(x_BLD))  # L tokens of a row are routed together
    balance, groups = routing.losses["load_balance"]
    return ((self.out(y_BLD) - target_BL1) ** 2).mean() + 0.01 * balance / groups, routing.only_stats()


@nnx.jit
def step(model, optimizer, x_BLD, target_BL1):
  (loss, routing), grads = nnx.value_and_grad(Mine.loss, has_aux=True)(model, x_BLD, target_BL1)
  optimizer.update(model, grads)
  return loss, routing.metrics["load"][0]


model = Mine(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

# %%
rng = np.random.default_rng(0)
x_NBLD = rng.normal(size=(300, 16, 32, 8)).astype(np.float32)
map_SD = rng.normal(size=(4, 8)).astype(np.float32)
signs_NBL = 2 * (x_NBLD[..., 0] > 0) + (x_NBLD[..., 1] > 0)
target_NBL1 = (x_NBLD * map_SD[signs_NBL]).sum(-1, keepdims=True)
losses_N, load_NE = zip(*(step(model, optimizer, x, target) for x, target in zip(x_NBLD, target_NBL1)))
print(f"loss {losses_N[0]:.2f} at the first step, {losses_N[-1]:.2f} at the last; "
      f"always saying the mean would cost {target_NBL1.var():.2f}")

# %%
picture, (loss, load) = plots.panels("AB", 9, 2.8)
plots.curves(loss, {"loss": {0: (range(300), losses_N)}}, "step", "loss")
share_NE = np.array(load_NE) / np.sum(load_NE, 1, keepdims=True)
plots.heat(load, share_NE.T, range(4), "step", "share of the tokens", percent=True)
load.set_ylabel("expert")
picture

# %% [markdown]
# A row of the right panel that ends pale is an expert that has starved: few tokens reach it, so it learns
# little, so fewer tokens choose it. The load-balancing loss works against that. Set its coefficient, `0.01`
# above, to `1.0` and run the last cells again: the rows even out, and the loss is another one.
#
# Next: the same batch through a dozen routers, in `routers_side_by_side`.
