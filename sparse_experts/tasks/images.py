"""Images of classes: which class is it, by one softmax over all classes or a sigmoid for each."""

import math
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_experts.config import image_tokens
from sparse_experts.data import Classes, Record, Source
from sparse_experts.data.images import datasets, sources
from sparse_experts.tasks import patches
from sparse_experts.tasks.task import Forecasts, Pairs, Routed, Task


class Images(Task):
  """The class of an image; with mixup it has two, each with a share of it."""

  models = ("vit",)
  primary = "nats_per_image"
  counts = types.MappingProxyType({"images": "nats_per_image"})
  items = "images"
  forecasts_targets = True
  few_shot = "features"
  grouping = "class"
  sources, datasets = sources, datasets

  @property
  def has_softmax(self) -> bool:
    return self.config.data.objective == "softmax"

  def losses(self, logits_BV: Any, target_BM: Any, share_BM: Any) -> Any:
    """Nats of each image, whose classes M have a share each."""
    from sparse_experts.tasks import sums

    return sums.CLASS_LOSSES[self.config.data.objective](logits_BV, target_BM, share_BM)

  def stack_tokens(self) -> dict[str, tuple[str, int | None]]:
    return {"encoder": ("image tokens", image_tokens(self.config))}

  def describe_source(self, source: Source) -> str:
    """How many images and classes there are, and what `data.image.size` does to them."""
    images, size = [*source.train, *source.valid], self.config.data.image.size
    edge = int(np.median([image["edge"] for image in images]))
    found = f"{len(images):,} images, {len(source.domains)} classes, {len(source.train):,} to train on"
    if edge == size:
      return found
    return (f"{found}; the usual shorter edge is {edge} px, data.image.size={size} "
            f"{'shrinks' if edge > size else 'enlarges'} it")

  def make_vocabulary(self, source: Source | None = None) -> Classes:
    """The classes of the head's rows; if their number is set and no source is given, they are numbered."""
    number = self.config.data.image.classes
    if source is None and number:
      return Classes([str(c) for c in range(number)])
    return Classes((source or self.open_source()).domains, number)

  def read_vocabulary(self, saved: bytes) -> Classes:
    return Classes.read(saved)

  def routed(self, layer: str, batch: dict[str, Any]) -> Routed:
    """Patches, and a class token in front if there is one; the domain is the image's class."""
    shape = len(batch["images"]), image_tokens(self.config)
    spread = lambda a_B: np.broadcast_to(np.asarray(a_B, np.int32)[:, None], shape)
    largest_B1 = np.asarray(batch["shares"]).argmax(-1)[:, None]
    label_B = np.take_along_axis(np.asarray(batch["targets"]), largest_B1, axis=1)[:, 0]
    return Routed(np.full(shape, -1, np.int32), spread(np.asarray(batch["weights"]) > 0), spread(label_B))

  def domains(self, vocabulary: Classes, source: Source) -> Sequence[str]:
    return vocabulary.names

  def places(self, layer: str, length: int) -> list[str]:
    return patches.places(self.config)

  def patch(self, record: Record, position: int) -> Any:
    return patches.picture(self.config, record["images"], position)

  def train_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any], key: Any = None):
    from sparse_experts.tasks import consistency, sums

    real_B = batch["weights"] > 0

    def one_pass(key: Any):
      logits_BV, routings = model.apply(params, buffers, batch, key=key)
      ce_B = self.losses(logits_BV, batch["targets"], batch["shares"])
      loss_B = consistency.smoothed(ce_B, logits_BV, self.config.train.label_smoothing, 1.0)
      rewards = lambda _, r: sums.row_rewards(r, ce_B, real_B[:, None])
      return logits_BV, loss_B, sums.layer_sums(routings, rewards)

    loss_B, layers = consistency.passes(self.config, one_pass, 1.0, key)
    return {"loss": sums.over(loss_B, real_B), "layers": layers}

  def target_losses(self, logits: Any, batch: dict[str, Any]) -> Any:
    """An image has one target."""
    import jax.numpy as jnp

    loss_B = self.losses(logits, batch["targets"], batch["shares"])
    return jnp.where(batch["weights"] > 0, loss_B, 0.0)[:, None]

  def forecasts(self, logits: Any, batch: dict[str, Any]) -> Forecasts:
    """Of an image's class; of sigmoid heads p is each class's own, which do not add up to 1."""
    import jax
    import jax.numpy as jnp

    from sparse_experts.tasks import sums

    link = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[self.config.data.objective]
    prob_BV, target_B = link(logits.astype(jnp.float32)), sums.largest(batch["targets"], batch["shares"])
    nats_B = self.losses(logits, batch["targets"], batch["shares"])
    found = *sums.forecast(prob_BV, target_B), nats_B, batch["weights"] > 0
    return Forecasts(*(x_B[:, None] for x_B in found))

  def eval_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any]) -> Pairs:
    """`accuracy` is of images whose largest logit is their class's; `loss` is the primary figure."""
    import jax.numpy as jnp

    from sparse_experts.tasks import sums

    logits_BV, routings = model.apply(params, buffers, batch)
    real_B = batch["weights"] > 0
    loss = sums.over(self.losses(logits_BV, batch["targets"], batch["shares"]), real_B)
    right_B = (logits_BV.argmax(-1) == sums.largest(batch["targets"], batch["shares"])).astype(jnp.float32)
    return {"loss": loss, "nats_per_image": loss, "accuracy": sums.over(right_B, real_B),
            } | sums.flat(sums.layer_sums(routings))

  def scored(self) -> str:
    return f"{self.config.data.objective} size={self.config.data.image.size}"

  def reads(self, vocab_size: int) -> str:
    return f"images of {self.config.data.image.size} pixels, {vocab_size} classes"

  def figure(self, numbers: dict[str, Any], prefix: str = "") -> str:
    return f"{super().figure(numbers, prefix)}, accuracy {numbers.get(prefix + 'accuracy', math.nan):.2%}"
