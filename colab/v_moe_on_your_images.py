# %% [markdown]
# # Train a V-MoE on a folder of your images
#
# After this notebook you can train a sparse vision Transformer on a folder, spend less compute on it after
# training with batch priority, and look at the patches that each expert takes.

# %%
import logging
import pathlib

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import sparse_experts
from sparse_experts.analysis import probe, summary, trace
from sparse_experts.config import load_config, replaced
from sparse_experts.report import patches, plots
from sparse_experts.report.sample import Sample
from sparse_experts.tasks import task_of
from sparse_experts.training.evaluate import Evaluator

logging.getLogger("absl").setLevel(logging.ERROR)  # the library that writes checkpoints says much

# %% [markdown]
# ## A folder of images
#
# A sub-folder for each class; PNG, JPEG and other files in it. Here the folder is made of scikit-learn's
# handwritten digits. To use yours, set `FOLDER` to it, leave this cell out, and below start from
# `v_moe/folder.py` with `data.image.size` and `model.patch_size` that fit your images: its group size follows
# them.

# %%
FOLDER = pathlib.Path("digits")
digits = load_digits()
for i, (image, label) in enumerate(zip(digits.images, digits.target)):
  (FOLDER / str(label)).mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(FOLDER / str(label) / f"{i}.png")
print(f"{len(list(FOLDER.glob('*/*.png')))} images in {len(list(FOLDER.iterdir()))} classes")

# %% [markdown]
# ## Train
#
# The shipped config for such small images: patches of 2 x 2 pixels, so 16 patches and a class token. Here
# every layer is sparse (there every second one) with eight experts, and each token goes to two. A fifth of
# each class is held out. The run is shorter than the config's.

# %%
config = replaced(load_config("v_moe/digits.py"), {
  "data.source": f"files:{FOLDER}", "model.moe_layers": (0, 1, 2, 3), "train.steps": 240,
  "train.batch_size": 32, "train.log_every": 40,
  "train.eval_every": 120, "train.checkpoint_every": 240})
run = sparse_experts.train(config, workdir="runs/images")

# %% [markdown]
# ## Give the experts fewer slots
#
# Capacity may be changed after training. With capacity factor `C`, experts have slots for `C` times the
# assignments, so at 0.25 three of four are dropped, whatever the router wants. Which ones? In order of
# position in the batch (`choice`), or those of which the router is least sure (`batch_priority`).

# %%
dataset = run.dataset("valid")


def at_capacity(factor, order):
  changed = replaced(run.config, {"model.eval_capacity_factor": factor, "model.router.order": order,
                                  "model.capacity_rule": "vmoe_paper"})
  return sparse_experts.load("runs/images", config=changed)


FACTORS, ORDERS = (0.1, 0.3, 1.0), ("choice", "batch_priority")
found = {order: [] for order in ORDERS}
for order in ORDERS:
  for factor in FACTORS:
    again = at_capacity(factor, order)
    evaluator = Evaluator(again.abstract_model("eval_capacity"), again.config, again.mesh, dataset)
    found[order].append(evaluator(again.params, again.buffers, len(dataset)))

# %%
picture, (axes,) = plots.panels("A", 5.5, 3.4, arms=ORDERS)
losses = {order: [of["nats_per_image"] for of in each] for order, each in found.items()}
plots.curves(axes, {order: {0: (FACTORS, of)} for order, of in losses.items()}, "capacity factor",
             "validation loss, nats per image")
plots.legend(picture)
picture

# %%
for factor, *each in zip(FACTORS, *found.values()):
  print(f"accuracy at capacity {factor:4}: "
        + ", ".join(f"{order} {of['accuracy']:.1%}" for order, of in zip(ORDERS, each)))

# %% [markdown]
# One run on few images: the curves show the direction, not its size. `experiments/v_moe` measures it over
# seeds.

# %% [markdown]
# ## Which patches keep their experts?
#
# The same images at capacity 0.25. A red patch got no slot in the last sparse layer.

# %%
batch = probe.probe(run, 16)
pixels_BHW3 = (batch["images"][:10] + 1) / 2
side = config.data.image.size // config.model.patch_size
rows = {"image": list(pixels_BHW3)}
for order in ORDERS:
  traced = trace.trace(at_capacity(0.25, order), batch, kind="eval_capacity", layers=["encoder/03"])
  kept_BL = np.zeros((16, 1 + side ** 2), bool)
  np.logical_or.at(kept_BL, (traced["example"], traced["position"]), traced["kept"])
  shown_BHW = np.kron(kept_BL[:10, 1:].reshape(10, side, side), np.ones((1, 2, 2)))
  rows[order] = list(pixels_BHW3 * shown_BHW[..., None] + np.array([0.5, 0, 0]) * (1 - shown_BHW[..., None]))
picture, (axes,) = plots.panels("A", 8.5, 2.8)
plots.images(axes, rows)
picture

# %% [markdown]
# ## Patches by expert
#
# Of each expert the patches that it takes with the largest gates, from different images, with a dimmed
# margin of what is around them.

# %%
batch = probe.probe(run, 256)
traced = trace.trace(run, batch)
sample = Sample(batch, task_of(config), run.tokenizer, ())
names = ["encoder/00", "encoder/03"]
picture, panels = plots.panels("AB", 8.5, 4.4)
for axes, layer in zip(panels, names):
  of_layer = summary.rows_of(traced, run.step, layer)
  taken = {f"expert {e}": patches.patches(of_layer, e, sample) for e in range(config.model.num_experts)}
  plots.images(axes, {name: [image / 255 for image in images] for name, images in taken.items() if images})
  plots.title(axes, layer)
picture

# %% [markdown]
# The report (`python -m sparse_experts report --workdir=runs/images`) draws such patches for each expert
# next to its share by class and position, with controls that tell what of it is more than chance.
