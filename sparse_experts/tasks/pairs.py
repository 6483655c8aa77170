"""Images with their texts, trained to find each other among all pairs of a batch."""

import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_experts.config import image_tokens
from sparse_experts.data import Record, Source
from sparse_experts.data.pairs import datasets, sources
from sparse_experts.errors import UserError
from sparse_experts.tasks import patches
from sparse_experts.tasks.task import Pairs, Routed, Task, spans


class Contrastive(Task):
  """CLIP's and LIMoE's loss. It is of the whole batch, so a batch is never cut into micro-batches."""

  models = ("limoe",)
  primary = "nats_per_pair"
  counts = types.MappingProxyType({"pairs": "nats_per_pair"})
  items = "pairs of images and texts"
  word_tokenizer = True
  rows_apart = False
  has_softmax = False  # it is over the texts or the images of a batch
  grouping = "modality"
  sources, datasets = sources, datasets

  def check(self) -> None:
    super().check()
    model, train, evaluation = self.config.model, self.config.train, self.config.eval
    if model.pool != "mean":
      raise UserError(f"model.pool='{model.pool}' reads a class token, but a limoe compares means over "
                      "tokens; choose model.pool=mean")
    for key, rows in (("train.batch_size", train.batch_size), ("eval.batch_size", evaluation.batch_size)):
      if rows < 2:
        raise UserError(f"{key}={rows} leaves a pair none to be told from; choose 2 or more")
    if train.accumulate > 1:
      raise UserError(f"train.accumulate={train.accumulate} would compare the pairs of each micro-batch only,"
                      " which is another loss; choose 1, and more devices for a larger batch")
    if (windows := evaluation.train_windows) % (rows := evaluation.batch_size):
      raise UserError(f"eval.train_windows={windows} does not divide by eval.batch_size={rows}; choose "
                      f"{-(-windows // rows) * rows} or another multiple")
    if mixup := self.config.data.image.mixup:
      raise UserError(f"data.image.mixup={mixup} blends classes, and pairs have none; choose 0")

  def stack_tokens(self) -> dict[str, tuple[str, int | None]]:
    return {"encoder": ("image and text tokens", image_tokens(self.config) + self.config.data.length)}

  def routed(self, layer: str, batch: dict[str, Any]) -> Routed:
    """An image's patches, then its text, which are segments 1 and 2; the domain is the modality."""
    id_BL, real_B1 = np.asarray(batch["texts"]), np.asarray(batch["weights"])[:, None] > 0
    image_BP = np.zeros((len(id_BL), image_tokens(self.config)), np.int32)
    join = lambda image_BP, text_BL: np.concatenate([image_BP, text_BL], axis=1).astype(np.int32)
    return Routed(join(image_BP - 1, id_BL),
                  join(image_BP + real_B1, 2 * (real_B1 & np.asarray(batch["text_mask"]))),
                  join(image_BP, np.ones_like(id_BL)))

  def domains(self, vocabulary: Any, source: Source) -> Sequence[str]:
    return "image", "text"

  def places(self, layer: str, length: int) -> list[str]:
    image = patches.places(self.config)
    return image + spans(length - len(image), word="word ")

  def patch(self, record: Record, position: int) -> Any:
    return patches.picture(self.config, record["images"], position)

  def train_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any], key: Any = None):
    from sparse_experts.tasks import sums

    logits_BC, routings = model.apply(params, buffers, batch, key=key)
    real_B, mask_BL = batch["weights"] > 0, model.mask(batch)
    loss_B = sums.contrastive(logits_BC, real_B)
    layers = sums.layer_sums(routings, lambda _, r: sums.row_rewards(r, loss_B, mask_BL))
    return {"loss": sums.over(loss_B, real_B), "layers": layers}

  def eval_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any]) -> Pairs:
    """With shares of images and of texts whose own is the likeliest of all; `loss` is the primary one."""
    from sparse_experts.tasks import sums

    logits_BC, routings = model.apply(params, buffers, batch)
    real_B = batch["weights"] > 0
    loss = sums.over(sums.contrastive(logits_BC, real_B), real_B)
    return {"loss": loss, "nats_per_pair": loss, "image_to_text": sums.own_is_best(logits_BC, real_B),
            "text_to_image": sums.own_is_best(logits_BC.T, real_B)} | sums.flat(sums.layer_sums(routings))

  @property
  def set_size(self) -> int | None:
    """A pair is compared with the others of its set, however rows and groups divide over devices."""
    return self.config.eval.batch_size

  def scored(self) -> str:
    data = self.config.data
    return f"{data.objective} size={data.image.size} of={self.config.eval.batch_size}"

  def reads(self, vocab_size: int) -> str:
    data = self.config.data
    return f"images of {data.image.size} pixels, tokenizer {data.tokenizer}, {vocab_size} ids"

  def summary(self, numbers: dict[str, Any]) -> list[str]:
    texts, images = numbers["image_to_text"], numbers["text_to_image"]
    return [f"validation loss {self.figure(numbers)}, {texts:.2%} of images find their text, {images:.2%} of "
            f"texts their image, dropless, on {numbers['pairs']:,} pairs"]
