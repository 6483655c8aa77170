# %% [markdown]
# # Spread experts over eight devices
#
# After this notebook you can read a mesh and its shardings, find the all-to-alls of a sparse layer in the
# compiled program, and check that the numbers do not depend on the mesh. The eight devices are simulated:
# all of this runs on a laptop.

# %%
import os

os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before jax starts
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from flax import nnx
from IPython.display import Markdown

from sparse_experts import partitioning
from sparse_experts.analysis.table import aligned
from sparse_experts.models.template import Template
from sparse_experts.moe import Experts, MoELayer, TopKRouter
from sparse_experts.profiling import hlo
from sparse_experts.report import plots

jax.device_count()

# %% [markdown]
# ## A layer and a mesh
#
# A `Template` splits a layer into arrays and the rest. The mesh has three axes: two groups of devices along
# `data`, four along `expert`, and `model`, which cuts hidden widths, is not used here.

# %%
G, T, D, E, F = 8, 32, 16, 8, 64  # 8 groups of 32 tokens, 8 experts
layer = Template(lambda key: MoELayer(
    TopKRouter(D, E, rngs=nnx.Rngs(key)), Experts(E, D, F, init_scale=1.0, rngs=nnx.Rngs(key)),
    dispatch="scatter", capacity_factor=1.25))
params, buffers = layer.init(jax.random.key(0))
x_GTD = jax.random.normal(jax.random.key(1), (G, T, D))

mesh = partitioning.make_mesh(data=2, expert=4)
mesh

# %% [markdown]
# ## Who holds what
#
# Each axis of a parameter has a name; `partitioning.RULES` says over which axes of the mesh it is cut. The
# axis `expert` of weights is cut over `expert`. Groups of tokens are cut over `data` and `expert` together.

# %%
shardings = partitioning.shardings(layer.axes, mesh)
rows = partitioning.batch_sharding(mesh)
for part, of in layer.axes.items():
  for name, axes in of.items():
    print(f"{part}/{name:6} {params[part][name].shape!s:12} {axes!s:28} -> {shardings[part][name].spec}")
print(f"x_GTD          {x_GTD.shape!s:12} {'':28} -> {rows.spec}")

# %%
held = lambda sharding, n: np.array([np.isin(range(n), range(n)[index]) for (index,) in
                                     sharding.devices_indices_map((n,)).values()], float)
picture, (left, right) = plots.panels("AB", 8, 3)
experts_alone = partitioning.shardings(("expert",), mesh)
for axes, sharding, what, n in ((left, experts_alone, "expert", E), (right, rows, "group of tokens", G)):
  plots.heat(axes, held(sharding, n), range(8), what, "held by the device", percent=True)
  axes.set_ylabel("device")
picture

# %% [markdown]
# Devices 0 to 3 hold all experts once, devices 4 to 7 hold copies of them. Each device holds one group of
# tokens. So a token that wants an expert of another device must travel, within the four devices of its row
# of the mesh.
#
# ## Find the two all-to-alls
#
# `jit` compiles one program for all eight devices. Its text shows what they send to each other.

# %%
def forward(params, x_GTD):
  return layer.bind(params)(x_GTD)[0]


def compiled(function, mesh):
  with partitioning.use(mesh):
    placed = jax.device_put((params, x_GTD),
                            (partitioning.shardings(layer.axes, mesh), partitioning.batch_sharding(mesh)))
    return jax.jit(function).lower(*placed).compile(), placed


program, placed = compiled(forward, mesh)
for i in hlo.instructions(program.as_text()):
  if i.opcode in hlo.SENT:
    print(f"{i.opcode}  {i.type}\n    from {i.op_name}")

# %% [markdown]
# Two all-to-alls: rows travel to their experts, and results travel back. There is no all-gather, so no
# device ever holds another one's experts.
#
# **Question.** How many will the gradient have?
#
# <details><summary>Answer</summary>
#
# Four. The gradient of an all-to-all is an all-to-all the other way, so each of the two gets a second one.
# The gradients of weights are summed over the devices that hold copies: these are the all-reduces. (In a
# first layer, whose input needs no gradient, the compiler leaves the last one out.)
#
# </details>

# %%
def loss(params, x_GTD):
  return (layer.bind(params)(x_GTD)[0] ** 2).mean()


gradient = jax.value_and_grad(loss, argnums=(0, 1))
sent = hlo.collectives(compiled(gradient, mesh)[0].as_text(), mesh.size)
Markdown(aligned([["kind", "phase", "bytes a device sends", "devices that exchange"], *(
    [c.kind, c.phase, f"{c.sent:,.0f}", " ".join(map(str, c.groups.tolist()))] for c in sent)]))

# %% [markdown]
# ## The same numbers on every mesh
#
# **Question.** Under capacity, tokens are dropped. Does it depend on the mesh which ones?
#
# <details><summary>Answer</summary>
#
# No. Capacity is counted in a group, and groups are fixed rows of the batch, wherever they lie. So are
# draws of noise.
#
# </details>

# %%
MESHES = {"one device": (1, 1, 1), "data 8": (8, 1, 1), "expert 8": (1, 8, 1), "data 2, expert 4": (2, 4, 1),
          "data 2, expert 2, model 2": (2, 2, 2)}
results, exchanges = {}, {}
for name, shape in MESHES.items():
  program, placed = compiled(gradient, partitioning.make_mesh(*shape))
  results[name] = jax.device_get(program(*placed))
  kinds = [c.kind for c in hlo.collectives(program.as_text(), int(np.prod(shape)))]
  exchanges[name] = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none"

# %%
one_loss, one_grads = results["one device"]
difference = lambda a, b: np.abs(a - b).max()
apart = lambda grads: max(jax.tree.leaves(jax.tree.map(difference, grads, one_grads)))
largest = max(np.abs(a).max() for a in jax.tree.leaves(one_grads))
assert all(apart(grads) < 1e-4 * largest for _, grads in results.values())
Markdown(aligned([["mesh", "loss", "largest difference of a gradient", "exchanges"], *(
    [name, f"{value:.7f}", f"{apart(grads):.1e}", exchanges[name]]
    for name, (value, grads) in results.items())]))

# %%
print(f"the largest gradient is {largest:.1e}: differences are rounding, as sums have another order")

# %% [markdown]
# **Question.** Why does `data 8` have no all-to-all, and why does one still want `expert 8`?
#
# <details><summary>Answer</summary>
#
# With `data 8` every device holds all experts, so no token travels. But then every device needs the memory
# for all of them, and their gradients are summed over all devices. With `expert 8` a device holds an eighth
# of the experts.
#
# </details>
#
# **Question.** With `model 2` there are more all-reduces. What do they sum?
#
# <details><summary>Answer</summary>
#
# Each device of a pair holds half of every expert's hidden units, so its product with `w_out` is half of
# the sum. The halves are added once forward; the gradient of the input is added once backward.
#
# </details>
#
# A whole run takes the same three numbers: `--config.mesh.data=2 --config.mesh.expert=4`. It may be resumed
# on another mesh. What a real slice of TPUs would need is in `will_it_fit`.
