# %% [markdown]
# # Watch experts specialise in a tiny Switch Transformer
#
# After this notebook you can train a sparse language model, follow which expert takes which tokens from
# checkpoint to checkpoint, sample from the model, and write the report of a run.
#
# The text is the running Python's own standard library; a token is a byte.

# %%
import logging

import numpy as np
from IPython.display import IFrame

import sparse_experts
from sparse_experts.analysis import probe, specialisation, summary, token_text, trace, untrained
from sparse_experts.analysis.table import aligned
from sparse_experts.report import expert_cards, plots
from sparse_experts.report.sample import Sample
from sparse_experts.tasks import task_of

logging.getLogger("absl").setLevel(logging.ERROR)  # the library that writes checkpoints says much

# %% [markdown]
# ## Train
#
# Two of four layers are sparse, with eight experts each and one expert per token. A checkpoint is kept
# every 30 steps.

# %%
config = sparse_experts.config.default_config()
config.model.num_layers, config.model.embed_dim, config.model.num_heads, config.model.head_dim = 4, 64, 2, 32
config.model.mlp_dim, config.model.num_experts, config.model.capacity_factor = 128, 8, 1.25
config.model.group_size = config.data.length = 128
config.train.steps, config.train.batch_size, config.optimizer.learning_rate = 150, 16, 5e-3
config.train.log_every, config.train.eval_every, config.train.layer_losses = 15, 75, "mean"
config.train.checkpoint_every, config.train.keep_checkpoints = 30, 5
config.eval.min_bytes, config.eval.train_windows = 50_000, 64
run = sparse_experts.train(config, workdir="runs/tiny_switch")

# %% [markdown]
# Each line shows the loss in nats per byte and, of each sparse layer, its *load* (the busiest expert over
# the mean), the share of assignments *dropped*, and the *entropy* of the router.
#
# ## Trace every checkpoint
#
# A trace holds a row for each token and sparse layer: which expert, with which gate. All checkpoints see
# the same records. Step 0 is a control: the trained model with the routers as they were drawn at the start.

# %%
batch = probe.probe(run, 64)
steps = range(30, 151, 30)
runs = [untrained.untrained(run, 0), *(sparse_experts.load("runs/tiny_switch", step) for step in steps)]
traced = trace.trace(runs, batch)
layers = {name: layer.num_experts for name, layer in run.abstract_model().sparse_layers.items()}
print(f"{len(traced['expert']):,} assignments; columns: {', '.join(list(traced)[:11])}, ...")

# %% [markdown]
# ## When do experts specialise?
#
# Left: how much a token's class (lowercase letter, space, bracket, ...) tells about its expert, in nats. It
# need not rise all the time: where several experts share the letters, the class alone tells less. Right:
# the share of a token's experts at the end that it already had.

# %%
ids, which_N = np.unique(traced["token_id"], return_inverse=True)
class_I = [token_text.token_class(run.tokenizer, int(i)) for i in ids]
classes = sorted(set(class_I))
class_N = np.array([classes.index(name) for name in class_I])[which_N]


def class_counts(layer, step):
  here = (traced["layer"] == layer) & (traced["step"] == step)
  return specialisation.counts(class_N[here], traced["expert"][here], len(classes), layers[layer])


settled, every = summary.saturation(traced), [0, *steps]
picture, (left, right) = plots.panels("AB", 9, 3.2, arms=layers)
nats = {layer: [specialisation.information(class_counts(layer, step)) for step in every] for layer in layers}
plots.curves(left, {layer: {0: (every, of)} for layer, of in nats.items()}, "step", "information, nats")
plots.curves(right, {layer: {0: (every, [settled[step, layer] for step in every])} for layer in layers},
             "step", "share of the final experts")
plots.legend(picture)
picture

# %% [markdown]
# ## Which expert takes what?
#
# A row is a class of tokens: which experts take it, with the routers of the start and at the end. Only
# classes of which there are at least a hundred tokens.

# %%
layer = list(layers)[-1]
picture, panels = plots.panels("AB", 10, 3.4)
for axes, step in zip(panels, (every[0], every[-1])):
  count_CE = class_counts(layer, step)
  shown = np.flatnonzero(count_CE.sum(1) >= 100)
  share_CE = count_CE[shown] / count_CE[shown].sum(1, keepdims=True)
  plots.heat(axes, share_CE, [classes[c] for c in shown], "expert", "share of the class", percent=True)
  plots.title(axes, f"{layer}, step {step}")
plots.share_height(panels)
picture

# %% [markdown]
# The tokens that each expert takes more often than chance would, the most typical first (a signed
# likelihood ratio sorts them; only those that chance alone would give in fewer than one of a thousand
# cases).

# %%
sample = Sample(batch, task_of(config), run.tokenizer, ())
last = summary.rows_of(traced, every[-1], layer)
typical = expert_cards.typical_tokens(last, layers[layer], sample)
print(aligned([["expert", f"typical tokens in {layer}"], *(
    [str(e), " ".join(row["text"] for row in rows) or "none"] for e, (rows, _) in enumerate(typical))]))

# %% [markdown]
# With bytes as tokens, experts sort themselves mostly by the byte. This table is of one short run with one
# seed: do not read more into it than the control says, which the report below draws next to each card.
#
# ## Is anything specialised?
#
# If it is, the loss rises when tokens go to random experts.

# %%
from sparse_experts.training.evaluate import evaluate

numbers = evaluate(run)
loss, random = numbers["nats_per_byte"], numbers["rerouted/nats_per_byte"]
print(f"{loss:.4f} nats per byte, {random:.4f} with random experts: "
      f"rerouting cost {numbers['rerouting_cost']:.4f}")

# %% [markdown]
# ## Sample
#
# Much too short a run to write Python, long enough to see its shape.

# %%
from sparse_experts.training.sample import sample as draw

print(draw(run, "def main(", length=120))

# %% [markdown]
# ## Write the report
#
# One HTML page that opens offline: curves, the balance of every layer over time, cards of the experts with
# their controls, the config. In a shell it is `python -m sparse_experts report --workdir=runs/tiny_switch`.

# %%
from sparse_experts import cli

cli.main(["report", "--workdir=runs/tiny_switch"])
IFrame("runs/tiny_switch/report.html", width="100%", height=600)

# %% [markdown]
# The page stands above where a notebook may show local files; elsewhere, as on Colab, download it and open
# it.
#
# Next: a router of your own, compared with this one over several seeds, in `your_own_router`.
