"""Few-shot linear evaluation: the accuracy of a ridge regression on a frozen model's features.

As V-MoE's (Riquelme et al. 2021, appendix E; google-research/vmoe): features are the head's input, scaled
to mean 0 and deviation 1 on the training images, and a constant 100; targets are 1 for an image's
class and -1 for the others. The paper picks the ridge by its rank over several data sets' test parts; here
cross-validation within the training images picks it, so that reported images choose nothing.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from sparse_experts import partitioning
from sparse_experts.data import Source
from sparse_experts.data.feed import eval_batches
from sparse_experts.data.images.datasets import in_order
from sparse_experts.errors import UserError
from sparse_experts.models.vit import ViT
from sparse_experts.tasks import task_of
from sparse_experts.training.evaluate import batch_rows
from sparse_experts.training.run import Run

LOG2_RIDGES = tuple(range(-10, 20))
FOLDS = 5


def check_shots(source: Source, shots: Sequence[int]) -> None:
  """Raises UserError if a class has fewer training images, or if no shots can choose the ridge."""
  counts, most = count_classes(source), max(shots)
  if most > counts.min():
    least = int(counts.argmin())
    raise UserError(f"{most} shots: class '{source.domains[least]}' has {counts[least]} training images;"
                    f" ask for {counts[least]} or fewer")
  if most == 1:
    raise UserError("1 shot alone cannot choose the ridge; ask for more shots too, such as 1,5")


def count_classes(source: Source) -> np.ndarray:
  """Training images of each class."""
  return np.bincount([image["label"] for image in source.train], minlength=len(source.domains))


def few_shot(look: Callable[[Sequence[dict]], np.ndarray], source: Source, shots: Sequence[int],
             seed: int = 0) -> dict[str, float]:
  """{"few_shot/N/accuracy", "few_shot/N/log2_ridge"} on all of `source.valid`, for N training images a class.

  look: images -> feature_ND, such as `functools.partial(features, run)`, or their pixels. `seed` decides
  which images are drawn; images of fewer shots are among those of more. One shot cannot be cross-validated
  and takes the ridge of the next larger number.
  """
  check_shots(source, shots)
  shots = sorted(set(shots))
  order = np.random.default_rng(seed).permutation(len(source.train))
  drawn = order[np.argsort([source.train[i]["label"] for i in order], kind="stable")]
  rank = np.concatenate([np.arange(n) for n in count_classes(source)])  # within its class
  kept, rank = drawn[rank < shots[-1]], rank[rank < shots[-1]]
  label = lambda images: np.array([image["label"] for image in images])
  training = [source.train[i] for i in kept]
  x_ND, y_N = look(training), label(training)
  test_MD, truth_M = look(source.valid), label(source.valid)
  scores: dict[str, float] = {}
  for n in shots:
    seen, tried = rank < n, rank < (n if n > 1 else shots[1])
    log2 = choose(x_ND[tried], y_N[tried], rank[tried])
    (guess_M,) = guesses(x_ND[seen], y_N[seen], test_MD, [log2])
    scores[f"few_shot/{n}/accuracy"] = float((guess_M == truth_M).mean())
    scores[f"few_shot/{n}/log2_ridge"] = log2
  return scores


def features(run: Run, images: Sequence[dict]) -> np.ndarray:
  """feature_ND in float64: the head's input for each image, dropless."""
  if task_of(run.config).few_shot != "features":
    raise UserError("few-shot evaluation is of images; choose a run of model.name='vit'")
  model, dataset = run.abstract_model("dropless"), in_order(images, run.config.data.image.size)
  assert isinstance(model, ViT)
  rows = batch_rows(model, run.config, run.mesh, dataset)
  look = jax.jit(lambda *a: model.features(*a)[0], out_shardings=partitioning.replicated(run.mesh))
  with partitioning.use(run.mesh):
    features_ND = [np.asarray(look(run.params, run.buffers, batch), np.float64) for batch in
                   eval_batches(dataset, rows, partitioning.batch_sharding(run.mesh))]
  return np.concatenate(features_ND)[:len(images)]


def choose(x_ND: np.ndarray, y_N: np.ndarray, rank_N: np.ndarray) -> int:
  """The log2 of the ridge with the highest cross-validated accuracy; ties go to the largest.

  rank_N: of each image within its class, from 0; it determines the fold.
  """
  right = np.zeros(len(LOG2_RIDGES), int)
  fold_N = rank_N % FOLDS
  for fold in np.unique(fold_N):
    seen = fold_N != fold
    for i, guess in enumerate(guesses(x_ND[seen], y_N[seen], x_ND[~seen], LOG2_RIDGES)):
      right[i] += (guess == y_N[~seen]).sum()
  return LOG2_RIDGES[len(right) - 1 - int(right[::-1].argmax())]


def guesses(x_ND: np.ndarray, y_N: np.ndarray, test_MD: np.ndarray,
            log2_ridges: Sequence[int]) -> Iterator[np.ndarray]:
  """Predicted classes of `test_MD` for each ridge, from one eigen-decomposition."""
  mean, deviation = x_ND.mean(0), x_ND.std(0) + 1e-5
  with_bias = lambda a: np.concatenate([(a - mean) / deviation, np.full((len(a), 1), 100.0)], axis=1)
  x, test = with_bias(x_ND), with_bias(test_MD)
  target_NC = 2.0 * (y_N[:, None] == np.arange(y_N.max() + 1)) - 1
  primal = len(x) >= x.shape[1]
  value, vector = np.linalg.eigh(x.T @ x if primal else x @ x.T)
  inside = vector.T @ (x.T @ target_NC if primal else target_NC)
  outside = test @ vector if primal else test @ x.T @ vector
  for log2 in log2_ridges:
    yield (outside @ (inside / (value + 2.0**log2)[:, None])).argmax(1)
