"""Figures of small ViTs on scikit-learn's digits: V-MoE's and sparse upcycling's claims, seed by seed.

Arms of one seed are readings of runs that they share; a run is trained once in a process, of
`configs/v_moe/digits.py` with STEPS steps. Accuracies are of the 359 held-out digits, in points.
"""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_experts import train
from sparse_experts.analysis import few_shot, probe, specialisation, trace
from sparse_experts.config import load_config, replaced
from sparse_experts.data import Source
from sparse_experts.data.images.sources import digits, open_source
from sparse_experts.training.evaluate import evaluate
from sparse_experts.training.run import Run

CONFIG = "configs/v_moe/digits.py"
STEPS, MORE_STEPS, QUICK_STEPS = 300, 150, 4
PERMUTATIONS = 20
SHOTS, DRAWS, KNOWN, CANVAS = 5, 20, 5, 12  # classes below KNOWN are trained on, others transferred to


def accuracy(arm: Mapping[str, Any], seed: int, quick: bool) -> float:
  """Points of a V-MoE that was trained for the arm's `share` of STEPS."""
  return _accuracy(_trained(seed, quick, round(arm["share"] * STEPS)))


def upcycled(arm: Mapping[str, Any], seed: int, quick: bool) -> float:
  """Points after MORE_STEPS steps with a schedule of their own, by what the arm's run starts from.

  `start`: grown (a dense model of STEPS steps, experts copies of its FFNs), dense (it goes on as it is), or
  scratch (a sparse model that starts anew). Two experts a token with gates that sum to one, so that what was
  grown is its parent before the first step.
  """
  plain = {"model.router.name": "top_k", "model.router.k": 1}  # dense FFNs as wide as one expert
  sparse = {"model.router.name": "top_k", "model.router.k": 2, "model.router.gate": "renormalized"}
  start, parent = arm["start"], {}
  if start != "scratch":
    parent["init_from"] = _trained(seed, quick, STEPS, plain, ":dense")[1]
  if start == "grown":
    parent["init_upcycle"] = True
  spec, own = (":dense", plain) if start == "dense" else ("", sparse)
  return _accuracy(_trained(seed, quick, MORE_STEPS, own | parent, spec))


def class_information(arm: Mapping[str, Any], seed: int, quick: bool) -> float:
  """Nats that a token's first expert tells of its image's class, less those of classes that are permuted
  among images; in the arm's `layer`, of four that are all sparse."""
  return _by_layer(seed, quick)[arm["layer"]]


@functools.lru_cache(maxsize=64)
def _by_layer(seed: int, quick: bool) -> list[float]:
  run, _ = _trained(seed, quick, STEPS, {"model.moe_layers": (0, 1, 2, 3)})
  dataset = run.dataset("valid")
  seen = trace.trace(run, probe.probe(run, 64 if quick else len(dataset)))
  rng, E, found = np.random.default_rng(0), run.config.model.num_experts, []
  for layer in np.unique(seen["layer"]):
    of = {name: a[(seen["layer"] == layer) & (seen["rank"] == 0)] for name, a in seen.items()}
    images, first, image_N = np.unique(of["example"], return_index=True, return_inverse=True)
    class_X = of["domain"][first]
    nats = lambda class_X, of=of, image_N=image_N: specialisation.information(
        specialisation.counts(class_X[image_N], of["expert"], 1 + class_X.max(), E))
    chance = np.mean([nats(rng.permutation(class_X)) for _ in range(PERMUTATIONS)])
    found.append(nats(class_X) - float(chance))
  return found


def transfer(arm: Mapping[str, Any], seed: int, quick: bool) -> float:
  """Points of a ridge regression on SHOTS images of each of five classes that no run saw, mean over DRAWS.

  `features`: what it reads of an image, pixels or the head's input of a V-MoE that was trained on the five
  other classes. Tested on the held-out images. With `moved` all digits lie at random places of a CANVAS.
  """
  moved = arm.get("moved", False)
  source = _unseen(moved)
  if arm["features"] == "pixels":
    look = lambda images: np.stack([image["image"][..., 0].astype(np.float64).ravel() for image in images])
  else:
    canvas = {"data.image.size": CANVAS, "model.patch_size": 3} if moved else {}  # 16 patches in both
    name = f"{__name__}:{'seen_classes_moved' if moved else 'seen_classes'}"
    run, _ = _trained(seed, quick, STEPS, canvas | {"data.source": name})
    look = functools.partial(few_shot.features, run)
  images = [*source.train, *source.valid]
  place, x_ND = {id(image): i for i, image in enumerate(images)}, look(images)
  chosen = lambda images: x_ND[[place[id(image)] for image in images]]
  return 100 * float(np.mean([
      few_shot.few_shot(chosen, source, [SHOTS], DRAWS * seed + draw)[f"few_shot/{SHOTS}/accuracy"]
      for draw in range(2 if quick else DRAWS)]))


def seen_classes(config_data) -> list[dict]:
  """A data source: the digits of the classes that are trained on."""
  return [image for image in digits()[0] if image["label"] < KNOWN]


def seen_classes_moved(config_data) -> list[dict]:
  """The same, each at four places of its own."""
  return _moved(seen_classes(config_data), 4)


@functools.cache
def _unseen(moved: bool) -> Source:
  """The other classes, numbered from 0, split as in training."""
  whole = open_source(load_config(CONFIG).data)
  part = lambda images: [image | {"label": image["label"] - KNOWN} for image in images
                         if image["label"] >= KNOWN]
  train, valid = part(whole.train), part(whole.valid)
  if moved:
    train, valid = _moved(train, 1), _moved(valid, 1)
  return Source(train, valid, whole.domains[KNOWN:], "")


def _moved(images: Sequence[dict], copies: int) -> list[dict]:
  """Every image at `copies` random places of a black square of CANVAS pixels, the same in every call."""
  rng, made = np.random.default_rng(0), []
  for image in images:
    edge = len(image["image"])
    for copy, (down, right) in enumerate(rng.integers(0, CANVAS - edge + 1, (copies, 2))):
      canvas = np.zeros((CANVAS, CANVAS, 3), np.uint8)
      canvas[down:down + edge, right:right + edge] = image["image"]
      made.append(image | {"image": canvas, "name": f"{image['name']}, place {copy}"})
  return made


def _trained(seed: int, quick: bool, steps: int, overrides: Mapping[str, Any] | None = None,
             spec: str = "") -> tuple[Run, str]:
  """(the run, its folder) of the config file's variant `spec`."""
  return _train(seed, QUICK_STEPS if quick else steps, tuple(sorted((overrides or {}).items())), spec)


@functools.lru_cache(maxsize=32)
def _train(seed: int, steps: int, overrides: tuple[tuple[str, Any], ...], spec: str) -> tuple[Run, str]:
  own = {f"train.{name}": steps for name in ("steps", "eval_every", "checkpoint_every")}
  config = replaced(load_config(CONFIG + spec), dict(overrides) | own | {"train.seed": seed})
  folder = tempfile.mkdtemp(dir=_folder().name)
  return train(config, folder), folder


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
  """Of all runs of this process; it goes with it."""
  return tempfile.TemporaryDirectory()


def _accuracy(trained: tuple[Run, str]) -> float:
  return 100 * evaluate(trained[0])["accuracy"]
