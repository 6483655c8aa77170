"""What each modality's tokens do in a sparse layer of a trained `limoe`, on its validation pairs."""

from typing import Any

import jax
import numpy as np

from sparse_experts import partitioning
from sparse_experts.data.feed import eval_batches
from sparse_experts.models.limoe import IMAGE, TEXT
from sparse_experts.training import evaluate

MODALITIES = {"image": IMAGE, "text": TEXT}


def measure(run: Any) -> dict[str, float]:
  """Figures of `modality` in every layer, and how often pairs find each other.

  Routing is without noise at `model.eval_capacity_factor`; retrieval is dropless, and at that capacity.
  """
  dataset, found = run.dataset("valid"), {}
  for name, kind in (("", "dropless"), ("capacity/", "eval_capacity")):
    evaluator = evaluate.Evaluator(run.abstract_model(kind), run.config, run.mesh, dataset)
    numbers = evaluator(run.params, run.buffers, len(dataset))
    for figure in ("nats_per_pair", "image_to_text", "text_to_image"):
      found[name + figure] = numbers[figure]
  prob_TE, expert_T, kept_T, task_T = by_token(run, dataset)
  for layer in prob_TE:
    for name, modality in MODALITIES.items():
      mine = task_T == modality
      figures = of_tokens(prob_TE[layer][mine], expert_T[layer][mine], kept_T[layer][mine])
      found |= {f"{layer}/{name}/{figure}": value for figure, value in figures.items()}
  return found


def of_tokens(prob_TE: np.ndarray, expert_T: np.ndarray, kept_T: np.ndarray) -> dict[str, float]:
  """Of some tokens of a layer.

  local: mean H(p) of a token, 0 when each is sure. spread: exp H(mean p), as many experts as they share by
  probability. experts: exp H(shares of experts in their choices), as many as they share in fact. largest:
  the share of the expert that most chose. success: tokens that got a slot.
  """
  share_E = np.bincount(expert_T, minlength=prob_TE.shape[1]) / len(expert_T)
  return {"local": float(entropy(prob_TE).mean()), "spread": float(np.exp(entropy(prob_TE.mean(0)))),
          "experts": float(np.exp(entropy(share_E))), "largest": float(share_E.max()),
          "success": float(kept_T.mean())}


def entropy(p_E: np.ndarray) -> np.ndarray:
  """-Σ p log p over the last axis, in nats."""
  return -(p_E * np.log(np.where(p_E > 0, p_E, 1.0))).sum(-1)


def by_token(run: Any, dataset: Any):
  """({layer: prob_TE}, {layer: expert_T}, {layer: kept_T}, task_T) of all real tokens, k being 1."""
  model, sharding = run.abstract_model("eval_capacity"), partitioning.batch_sharding(run.mesh)
  prob, expert, kept, tasks = {}, {}, {}, []
  rows = evaluate.batch_rows(model, run.config, run.mesh, dataset)
  for batch in eval_batches(dataset, rows, sharding):
    _, routings = run.model(batch, trace=True, kind="eval_capacity")
    mask_T = np.asarray(model.mask(batch)).ravel()
    tasks.append(np.tile(model.modality_L, len(batch["weights"]))[mask_T])
    for name, routing in jax.device_get(routings).items():
      E = routing.prob.shape[-1]
      expert_GT, kept_GT = np.zeros(routing.token.shape, np.int32), np.zeros(routing.token.shape, bool)
      np.put_along_axis(expert_GT, routing.token, routing.expert, axis=1)
      np.put_along_axis(kept_GT, routing.token, routing.kept, axis=1)
      values = routing.prob.reshape(-1, E), expert_GT.ravel(), kept_GT.ravel()
      for of, value in zip((prob, expert, kept), values, strict=True):
        of.setdefault(name, []).append(value[mask_T])
  join = lambda parts: {name: np.concatenate(arrays) for name, arrays in parts.items()}
  return join(prob), join(expert), join(kept), np.concatenate(tasks)
