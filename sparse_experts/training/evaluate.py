"""The measures of a trained model on the frozen list of validation windows.

Primary figure: nats per UTF-8 byte of target, dropless, over targets that stand for text (sentinels and
ends of documents are counted apart). It does not depend on batch, mesh or hosts.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sparse_experts import moe, partitioning
from sparse_experts.data import Dataset, bigram_entropy, eval_batches, has_images, has_pairs, unigram_entropy
from sparse_experts.models.build import build
from sparse_experts.results import PRIMARY, primary_name
from sparse_experts.training import metrics
from sparse_experts.training.step import make_eval_step

_NAMES = {"loss": "loss", "bytes": PRIMARY, "text": "nats_per_target", "marks": "nats_per_mark",
          "image_loss": "nats_per_image", "pair_loss": "nats_per_pair"}


def eval_model(config: ConfigDict, vocab_size: int, kind: str = "dropless", router: Any = None) -> Any:
  """dropless: the primary figure. eval_capacity: with `eval_capacity_factor`. rerouted: random experts."""
  if kind == "rerouted":
    return build(config, vocab_size, "dropless", router=router, edit=moe.reroute)
  return build(config, vocab_size, kind, router=router)


class Evaluator:
  """Runs one model over the first records of a dataset; compiled once."""

  def __init__(self, model: Any, config: ConfigDict, mesh: Mesh, dataset: Dataset):
    self._dataset, self._mesh = dataset, mesh
    self._rows = batch_rows(model, config, mesh, dataset)
    # What a pair is told from does not depend on how rows and groups divide over devices.
    self._records = config.eval.batch_size if has_pairs(config.data) else None
    self._step = jax.jit(make_eval_step(model), out_shardings=partitioning.replicated(mesh))

  def __call__(self, params: Any, buffers: Any, num_records: int) -> dict[str, float]:
    """Numbers by name: see `report`."""
    pairs = None
    with partitioning.use(self._mesh):
      sharding = partitioning.batch_sharding(self._mesh)
      for batch in eval_batches(self._dataset, self._rows, sharding, num_records, self._records):
        # Float64 on the host: sums of a million targets keep their last digits.
        sums = jax.device_get(self._step(params, buffers, batch))
        pairs = metrics.add(pairs, jax.tree.map(lambda x: np.asarray(x, np.float64), sums))
    return report(pairs)


def report(pairs: dict[str, Any]) -> dict[str, float]:
  """nats_per_byte, nats_per_target, nats_per_mark, loss (of all), target_bytes, router/<layer>/<metric>.

  Of images nats_per_image, accuracy and loss; of pairs nats_per_pair, image_to_text, text_to_image and loss.
  """
  numbers = {_NAMES.get(name, name): value for name, value in metrics.reduce(pairs).items()}
  dead = {name.removesuffix("load") + "dead": metrics.dead_experts(load)
          for name, (load, _) in pairs.items() if name.endswith("/load")}
  if "image_loss" in pairs:
    return numbers | dead | {"images": int(pairs["image_loss"][1])}
  if "pair_loss" in pairs:
    return numbers | dead | {"pairs": int(pairs["pair_loss"][1])}
  return numbers | dead | {"target_bytes": int(pairs["bytes"][1]), "targets": int(pairs["text"][1])}


def batch_rows(model: Any, config: ConfigDict, mesh: Mesh, dataset: Dataset) -> int:
  """`eval.batch_size`, raised until rows and routing groups divide over the devices."""
  quantum = model.row_quantum(dataset[0], mesh.shape["data"] * mesh.shape["expert"])
  return -(-config.eval.batch_size // quantum) * quantum


def measure(config: ConfigDict, numbers: dict[str, float]) -> str:
  """What the primary figure is a figure of; runs whose measures differ are not to be compared."""
  d = config.data
  if has_images(d):
    return f"{primary_name(config)} {d.objective} size={d.image.size} images={numbers['images']}"
  if has_pairs(d):
    return (f"{primary_name(config)} {d.objective} size={d.image.size} of={config.eval.batch_size} "
            f"pairs={numbers['pairs']}")
  masked = f" noise_density={d.noise_density:g}" if d.objective == "span_corruption" else ""
  return (f"{primary_name(config)} {d.objective} length={d.length}{masked} "
          f"target_bytes={numbers['target_bytes']}")


def entropies(dataset: Dataset, num_records: int) -> dict[str, float]:
  """Unigram and bigram entropy of the very targets that are evaluated, nats per target; of text alone."""
  if "images" in dataset[0]:
    return {}
  records = [dataset[i] for i in range(min(num_records, len(dataset)))]
  return {"unigram_entropy": unigram_entropy(records), "bigram_entropy": bigram_entropy(records)}


def evaluate(run: Any, dataset: Dataset | None = None) -> dict[str, float]:
  """Everything `evaluate` reports of a `Run`, on at least `eval.min_bytes` bytes of target, or all images.

  `capacity/...`: the same at the evaluation capacity; `rerouted/...` and `rerouting_cost`: the rise of the
  primary figure when every token goes to random experts with its own gates, where there are assignments.
  """
  dataset = run.dataset("valid") if dataset is None else dataset
  records = dataset.records_for_bytes(run.config.eval.min_bytes)
  layers = run.models("dropless").sparse_layers.values()
  kinds = ["dropless"] + ["eval_capacity"] * bool(layers)
  if layers and all(layer.router is not None for layer in layers):
    kinds.append("rerouted")
  found = {kind: Evaluator(run.models(kind), run.config, run.mesh, dataset)(run.params, run.buffers, records)
           for kind in kinds}
  numbers = found["dropless"] | entropies(dataset, records) | {"step": run.step, "windows": records}
  if "eval_capacity" in kinds:
    numbers |= {f"capacity/{k}": v for k, v in found["eval_capacity"].items()}
  if "rerouted" in kinds:
    numbers |= {f"rerouted/{k}": v for k, v in found["rerouted"].items() if not k.startswith("router/")}
    primary = primary_name(run.config)
    numbers["rerouting_cost"] = found["rerouted"][primary] - found["dropless"][primary]
  return numbers


def in_words(numbers: dict[str, float]) -> str:
  """The figures a reader wants first, one a line."""
  if "images" in numbers:
    primary, lines = "nats_per_image", _images_in_words(numbers)
  elif "pairs" in numbers:
    primary, lines = "nats_per_pair", _pairs_in_words(numbers)
  else:
    primary, lines = PRIMARY, _text_in_words(numbers)
  unit = primary.replace("_", " ")
  accuracy = lambda prefix: (
      f", accuracy {numbers[f'{prefix}/accuracy']:.2%}," if f"{prefix}/accuracy" in numbers else "")
  if f"capacity/{primary}" in numbers:
    lines.append(f"{numbers[f'capacity/{primary}']:.4f} {unit}{accuracy('capacity')} at the evaluation "
                 "capacity")
  if "rerouting_cost" in numbers:
    lines.append(f"{numbers[f'rerouted/{primary}']:.4f} {unit}{accuracy('rerouted')} with random experts: "
                 f"rerouting cost {numbers['rerouting_cost']:.4f}")
  layers = [k.removesuffix("/dead") for k in numbers if k.endswith("/dead") and k.startswith("router/")]
  if layers:
    each = ", ".join(
        f"{layer.removeprefix('router/')} {numbers[f'{layer}/dead']:.0f} (load max/mean "
        f"{numbers.get(f'{layer}/load_max_mean', math.nan):.2f})" for layer in layers)
    lines.append(f"dead experts: {each}")
  return "\n".join(lines)


def _images_in_words(numbers: dict[str, float]) -> list[str]:
  return [f"validation loss {numbers.get('nats_per_image', math.nan):.4f} nats per image, accuracy "
          f"{numbers.get('accuracy', math.nan):.2%}, dropless, on {numbers['images']:,} images"]


def _pairs_in_words(numbers: dict[str, float]) -> list[str]:
  loss, texts, images = (numbers.get(name, math.nan) for name in (
      "nats_per_pair", "image_to_text", "text_to_image"))
  return [f"validation loss {loss:.4f} nats per pair, {texts:.2%} of images find their text, {images:.2%} of "
          f"texts their image, dropless, on {numbers['pairs']:,} pairs"]


def _text_in_words(numbers: dict[str, float]) -> list[str]:
  per_target = numbers.get("nats_per_target", math.nan)
  gain = numbers["unigram_entropy"] - per_target
  lines = [
      f"validation loss {numbers.get('nats_per_byte', math.nan):.4f} nats per byte, {per_target:.4f} per "
      f"target, dropless, on {numbers['target_bytes']:,} bytes",
      f"{abs(gain):.4f} {'below' if gain >= 0 else 'above'} the unigram entropy of the same targets, "
      f"{numbers['unigram_entropy']:.4f} (bigram {numbers['bigram_entropy']:.4f})"]
  if "nats_per_mark" in numbers:
    lines.append(f"sentinels and ends of documents {numbers['nats_per_mark']:.4f} nats each")
  return lines
