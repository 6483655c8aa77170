"""Pictures of the three questions: capacity of one model, equal FLOPs on colour images, digits."""

from collections.abc import Mapping
from typing import Any

from experiments.v_moe.cifar import ARMS
from sparse_experts.report import plots
from sparse_experts.report.picture import Picture

NAMES = {"dense": "dense", "v_moe": "V-MoE", "soft_moe": "Soft MoE"}
ORDERS = {"choice": "order of tokens", "batch_priority": "batch priority"}


def capacity(found: Mapping[str, Any]) -> Picture:
  """Accuracy and nats against the effective capacity, a line for each order, and their difference in nats.

  found: results.json of the part `capacity`.
  """
  of = {label: [f for name, f in found.items() if name.startswith(f"capacity/{order}/")]
        for order, label in ORDERS.items()}
  curve = lambda label, name, scale=1: {
      0: ([f["effective"] for f in of[label]], [scale * f[name] for f in of[label]])}
  x, (first, second) = "effective capacity: slots x experts / (k x tokens)", ORDERS.values()
  picture, (accuracy, nats, minus) = plots.panels("ABC", 11, 3.3, arms=of)
  plots.curves(accuracy, {label: curve(label, "accuracy", 100) for label in of}, x, "accuracy, %")
  nats_of = {label: curve(label, "nats_per_image") for label in of}
  plots.curves(nats, nats_of, x, "loss, nats per image")
  plots.differences(minus, nats_of, first, x, f"{second} minus {first},\nnats per image", shown_from=0)
  plots.title(minus, "one model: no interval")
  plots.legend(picture)
  return picture


def cifar(found: Mapping[str, Any], runs: Mapping[str, Any]) -> Picture:
  """Accuracy while training and its paired difference to dense; differences at the step that all reached,
  over seeds, and where runs were stopped, over seeds and images.

  found: of `paired`. runs: {"arm/seed": its evaluations}.
  """
  step = found["same step"]["step"]
  curves: dict[str, dict[str, plots.Curve]] = {NAMES[arm]: {} for arm in ARMS}
  for name, run in runs.items():
    arm, seed = name.split("/")
    if run["valid"]:
      steps, accuracy, _ = zip(*run["valid"])
      curves[NAMES[arm]][seed] = steps, [100 * a for a in accuracy]
  picture, (accuracy, minus, same, stopped) = plots.panels(
      "AB;CD", 9, 5.6, arms=curves, height_ratios=[1.5, 1])
  plots.curves(accuracy, curves, "step", "accuracy on validation images, %")
  plots.differences(minus, curves, NAMES["dense"], "step", "accuracy minus dense, points", shown_from=0)
  plots.title(minus, "paired by seed: mean and its 95% t-interval")
  pairs = {name: of for name, of in found.items() if " - " in name}
  words = {name: " minus ".join(NAMES[arm] for arm in name.split(" - ")) for name in pairs}
  at = lambda arm, seed: dict(zip(*curves[arm][seed]))[step]
  plots.seeds(same, {words[name]: [at(NAMES[a], seed) - at(NAMES[b], seed) for seed in curves[NAMES[a]]
                                   if seed in curves[NAMES[b]]]
                     for name, (a, b) in ((name, name.split(" - ")) for name in pairs)},
              "difference in accuracy, points", line=0, plain=True)
  plots.title(same, f"all at step {step:,}: a point per seed;\nmean and its 95% t-interval over seeds")
  plots.seeds(stopped, {}, "difference in accuracy, points", line=0, plain=True, intervals={
      words[name]: tuple(100 * x for x in (of["right"]["mean"], *of["right"]["both"]))
      for name, of in pairs.items() if of["right"]["both"]})
  plots.title(stopped, "where they were stopped: mean and\nits 95% interval over seeds and images")
  plots.legend(picture)
  return picture


def digits(found: Mapping[str, Any]) -> Picture:
  """Accuracy by seed and its paired difference; nats, of which means and deviations alone were kept."""
  dense, sparse = found["accuracy, %"].values()
  picture, (accuracy, minus, nats, nats_minus) = plots.panels("AB;CD", 9, 4.2)
  plots.seeds(accuracy, found["accuracy, %"], "accuracy, %")
  plots.title(accuracy, "a point per seed; mean and its 95% t-interval")
  pair = "sparse minus dense"
  plots.seeds(minus, {pair: [s - d for s, d in zip(sparse, dense, strict=True)]},
              "difference in accuracy, points", line=0, plain=True)
  plots.title(minus, "paired by seed; mean and its 95% t-interval")
  spread = {arm: (m, m - s, m + s) for arm, (m, s) in found["nats per image, mean and deviation"].items()}
  plots.seeds(nats, {}, "loss, nats per image", intervals=spread)
  plots.title(nats, "mean and standard deviation over seeds")
  plots.seeds(nats_minus, {}, "difference in loss, nats per image", line=0, plain=True, intervals={
      pair: tuple(found["nats per image, sparse minus dense and 95% interval"])})
  plots.title(nats_minus, "paired by seed; mean and its 95% t-interval")
  return picture
