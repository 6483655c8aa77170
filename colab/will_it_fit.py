# %% [markdown]
# # Find out whether a full-size model fits a TPU slice
#
# After this notebook you can tell from a config which slice of TPUs its train step needs, what fills the
# memory, and what travels between the chips, without a TPU: the real step is compiled for chips that need
# not be there.

# %%
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

from IPython.display import Markdown

from sparse_experts.analysis.table import aligned
from sparse_experts.aot.chips import CHIPS
from sparse_experts.config import load_config
from sparse_experts.report import plots

# %% [markdown]
# ## The model
#
# Switch-Base as published: T5-Base with every other feed-forward network sparse, 128 experts each.

# %%
config = load_config("switch/base.py")
model = config.model
print(f"{model.num_layers} encoder and {model.num_layers} decoder layers of width {model.embed_dim}, "
      f"{model.num_experts} experts in every second one; {config.train.batch_size} rows a batch")
print(f"a chip has {CHIPS['v5e'].hbm_gib} GiB")

# %% [markdown]
# ## Guess first
#
# The slice has 4 x 4 chips of TPU v5e, with the memory printed above. Write down before you go on:
#
# 1. How many GiB do the parameters take, in float32, if no chip holds another one's experts? 2. Does a
# train step fit? 3. And if experts are spread over only four chips, so that there are four copies of each?
#
# <details><summary>How to get at the first</summary>
#
# An expert has three matrices of width x hidden width. Half of all layers are sparse. All else is about a
# T5-Base, which is small beside that. Four bytes a number; divide the experts by the number of chips.
#
# </details>

# %%
expert_floats = 3 * model.embed_dim * model.mlp_dim
sparse_layers = 2 * model.num_layers // model.moe_every  # of encoder and decoder
experts_gib = 4 * expert_floats * model.num_experts * sparse_layers / 2**30
print(f"experts: {experts_gib:.1f} GiB in all, {experts_gib / 16:.2f} GiB on each of 16 chips, "
      f"{experts_gib / 4:.2f} GiB if 4 chips share them")

# %% [markdown]
# ## Compile it for four chips that share the experts
#
# This answers the third question. With libtpu (`pip install 'jax[tpu]'`) the command runs here, with no
# TPU; it takes about a minute. Without, its result is read from the file next to this notebook.

# %%
stored = json.loads(pathlib.Path("will_it_fit.json").read_text())
command = stored[1]["command"]
if importlib.util.find_spec("libtpu"):
  run = subprocess.run([sys.executable, *command.split()[1:]], capture_output=True, text=True)
  *lines, last = run.stdout.splitlines()
  four = json.loads(last)
else:
  lines, four = ["libtpu is not here: a stored result"], stored[1]["figures"]
print(command, *lines, sep="\n")
print("fits" if four["fits"] else "does not fit")

# %% [markdown]
# ## And for sixteen
#
# What fits is compiled to the end, which takes minutes; so this one is always read from the file.

# %%
print(stored[0]["command"])
sixteen = stored[0]["figures"]
memory = sixteen["hbm_per_chip_gib"]
print(f"{memory['peak']:.2f} of the {memory['usable']} GiB that a program may use: "
      f"{'fits' if sixteen['fits'] else 'does not fit'}")

# %%
PARTS = ("parameters", "optimizer", "temporaries", "program")
names = {"experts over 4 chips": four, "experts over 16 chips": sixteen}
picture, (axes,) = plots.panels("A", 7, 3, arms=names)
gib = {name: [of["hbm_per_chip_gib"].get(part, math.nan) for part in PARTS] for name, of in names.items()}
plots.bars(axes, gib, PARTS, "GiB per chip")
axes.axhline(memory["usable"], color="0.35", lw=1)
plots.title(axes, "line: what a program may use for all of it")
plots.legend(picture, lines=False)
picture

# %% [markdown]
# Temporaries (activations and gradients) and the program are known only of what was compiled to the end.
#
# ## What travels, and what it costs
#
# Per step and chip, for sixteen. The times come from published rates and are no measurement: compute,
# memory and links each at their best.

# %%
rows = [[kind, str(of["count"]), f"{of['bytes'] / 2**20:,.1f}"]
        for kind, of in sixteen["collectives"].items()]
Markdown(aligned([["collective", "times per step", "MiB that a chip sends"], *rows]))

# %%
times = sixteen["estimated_step_seconds"]
picture, (axes,) = plots.panels("A", 5, 2.4)
terms = {"compute": "compute", "HBM traffic": "hbm", "links": "interconnect"}
plots.bars(axes, {"step": [1000 * times[term] for term in terms.values()]}, list(terms), "ms per step")
picture

# %% [markdown]
# `--find --topology=v5e` looks for the smallest slice that fits, and for a mesh on it. `docs/tpu.md` goes
# from here to a run on the machines.
