"""Language models: text continued token by token, or with masked spans to fill."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_experts.config import ConfigDict
from sparse_experts.config.mixture import parse
from sparse_experts.data import Dataset, Record, Source, Tokenizer
from sparse_experts.data.text import datasets, mixture, sources
from sparse_experts.data.text.statistics import bigram_entropy, unigram_entropy
from sparse_experts.tasks.task import Forecasts, Pairs, Routed, Task

TEACHER_LOGITS = "teacher_logits"  # a batch's field, [B, L, V] float32


class TokenTargets(Task):
  """What tasks have in common whose rows are tokens, each with a target and a weight."""

  items = "text"
  token_targets = True
  few_shot = "labels"

  def routed(self, layer: str, batch: dict[str, Any]) -> Routed:
    ids, segments = (("encoder_inputs", "encoder_segments") if layer.startswith("encoder") else
                     ("decoder_inputs", "segments"))
    return Routed(batch[ids], batch[segments], batch["domain"][:, None] + 0 * batch[segments])

  def train_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any], key: Any = None):
    """Where a batch has a teacher's logits, the loss is mixed with theirs: `training/distill.py`."""
    from sparse_experts.tasks import consistency, sums

    weight_BL = batch["weights"]

    def one_pass(key: Any):
      logits_BLV, routings = model.apply(params, buffers, batch, key=key)
      ce_BL = sums.cross_entropy(logits_BLV, batch["targets"]) * weight_BL
      loss_BL = consistency.smoothed(ce_BL, logits_BLV, self.config.train.label_smoothing, weight_BL)
      if TEACHER_LOGITS in batch and (share := self.config.distill.weight):
        soft_BL = sums.soft_cross_entropy(logits_BLV, batch[TEACHER_LOGITS]) * weight_BL
        loss_BL = (1 - share) * loss_BL + share * soft_BL
      rewards = lambda name, r: sums.token_rewards(name, r, ce_BL, batch)
      return logits_BLV, loss_BL, sums.layer_sums(routings, rewards)

    loss_BL, layers = consistency.passes(self.config, one_pass, weight_BL, key)
    return {"loss": (sums.over(loss_BL, weight_BL > 0)[0], weight_BL.sum()), "layers": layers}

  def target_losses(self, logits: Any, batch: dict[str, Any]) -> Any:
    import jax.numpy as jnp

    from sparse_experts.tasks import sums

    return jnp.where(batch["weights"] > 0, sums.cross_entropy(logits, batch["targets"]), 0.0)

  def reads(self, vocab_size: int) -> str:
    return f"tokenizer {self.config.data.tokenizer}, {vocab_size} ids"


class Text(TokenTargets):
  """What both have in common: the primary figure is nats per UTF-8 byte of target.

  It covers targets that stand for text. Sentinels and ends of documents have their own. Of data that are ids,
  whose bytes nobody knows, it is nats per target.
  """

  forecasts_targets = True
  sources = sources
  mixes = True

  def __init__(self, config: ConfigDict):
    super().__init__(config)
    self.mixture = parse(config.data.source)  # {component: rate and source}
    self.is_ids = config.data.tokenizer.startswith("vocabulary:")
    self.primary = "nats_per_target" if self.is_ids else "nats_per_byte"
    bytes_of = {} if self.is_ids else {"target_bytes": "nats_per_byte"}
    self.counts = bytes_of | {"targets": "nats_per_target"}

  def rows(self, tokenizer: Tokenizer) -> datasets.Rows:
    """How a window of text becomes a record."""
    raise NotImplementedError

  def make_dataset(self, split: str, vocabulary: Tokenizer, source: Source) -> Dataset:
    rows = self.rows(vocabulary)
    parts = mixture.components(list(self.mixture), source) if self.mixture else None
    if parts is None:  # also where other data than the config's are given
      return datasets.make_dataset(self.config, split, vocabulary, source, rows)
    made = [datasets.make_dataset(self.config, split, vocabulary, its, rows) for its in parts.values()]
    return mixture.mix(self.config, split, made, [of.rate for of in self.mixture.values()])

  def example(self, vocabulary: Tokenizer) -> Record:
    return datasets.example(self.rows(vocabulary)) | (
        {"component": np.int32(0)} if self.mixture and not self.config.given.data else {})

  def domains(self, vocabulary: Tokenizer, source: Source) -> Sequence[str]:
    return ["(no folder)" if name == "." else name for name in source.domains]

  def row_lengths(self, vocabulary: Tokenizer) -> dict[str, int]:
    rows = self.rows(vocabulary)
    return {"encoder": rows.encoder, "targets": rows.targets}

  def eval_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any]) -> Pairs:
    """`loss` is of all that is trained on, by weight; `nats_per_mark` of sentinels and ends of documents."""
    from sparse_experts.tasks import sums

    logits_BLV, routings = model.apply(params, buffers, batch)
    ce_BL = sums.cross_entropy(logits_BLV, batch["targets"])
    weight_BL, bytes_BL = batch["weights"], batch["target_bytes"]
    trained_BL = weight_BL > 0
    text_BL, mark_BL = trained_BL & (bytes_BL > 0), trained_BL & (bytes_BL == 0)
    text, targets = sums.over(ce_BL, text_BL)
    per_byte = {} if self.is_ids else {"nats_per_byte": (text, sums.over(bytes_BL, text_BL)[0])}
    of_parts = {}
    for c, name in enumerate(self.mixture if "component" in batch else ()):
      its_BL = text_BL & (batch["component"] == c)[:, None]
      total, number = sums.over(ce_BL, its_BL)
      of_parts[f"{name}/{self.primary}"] = total, number if self.is_ids else sums.over(bytes_BL, its_BL)[0]
    return per_byte | of_parts | {
        "loss": (sums.over(ce_BL * weight_BL, trained_BL)[0], weight_BL.sum()),
        "nats_per_target": (text, targets),
        "nats_per_mark": sums.over(ce_BL, mark_BL),
    } | sums.flat(sums.layer_sums(routings))

  def forecasts(self, logits: Any, batch: dict[str, Any]) -> Forecasts:
    """Of targets that stand for text, as in `nats_per_target`."""
    import jax
    import jax.numpy as jnp

    from sparse_experts.tasks import sums

    prob_BLV, target_BL = jax.nn.softmax(logits.astype(jnp.float32)), batch["targets"]
    return Forecasts(*sums.forecast(prob_BLV, target_BL), sums.cross_entropy(logits, target_BL),
                     (batch["weights"] > 0) & (batch["target_bytes"] > 0))

  @property
  def asked(self) -> int:
    return self.config.eval.min_bytes

  def evaluated_records(self, dataset: Dataset) -> int:
    """The first records that hold targets of `eval.min_bytes` bytes; all if there are fewer."""
    total = 0
    for i in range(dataset.num_windows):
      total += int(dataset[i]["target_bytes"].sum())
      if total >= self.asked:
        return i + 1
    return dataset.num_windows

  def quick_records(self, dataset: Dataset) -> int:
    """Text is counted in bytes: `quick` asks for fewer."""
    return self.evaluated_records(dataset)

  def baselines(self, dataset: Dataset, num_records: int) -> dict[str, float]:
    """Unigram and bigram entropy of the very targets that are evaluated, nats per target."""
    records = [dataset[i] for i in range(min(num_records, len(dataset)))]
    return {"unigram_entropy": unigram_entropy(records), "bigram_entropy": bigram_entropy(records)}

  def scored(self) -> str:
    rates = ",".join(f"{name}:{of.rate:g}" for name, of in self.mixture.items())
    mixed = f" mixture={rates}" if rates else ""
    return f"{self.config.data.objective} length={self.config.data.length}{mixed}"

  def summary(self, numbers: dict[str, Any]) -> list[str]:
    per_target, unigram = numbers.get("nats_per_target", math.nan), numbers["unigram_entropy"]
    gain = unigram - per_target
    amount = (f"{per_target:.4f} nats per target, dropless, on {numbers['targets']:,} ids" if self.is_ids else
              f"{numbers.get('nats_per_byte', math.nan):.4f} nats per byte, {per_target:.4f} per target, "
              f"dropless, on {numbers['target_bytes']:,} bytes")
    lines = [
        f"validation loss {amount}",
        f"{abs(gain):.4f} {'below' if gain >= 0 else 'above'} the unigram entropy of the same targets, "
        f"{unigram:.4f} (bigram {numbers['bigram_entropy']:.4f})"]
    if parts := [f"{name} {numbers[key]:.4f}" for name in self.mixture
                 if (key := f"{name}/{self.primary}") in numbers]:
      lines.append(f"{self.unit} of each source: {', '.join(parts)}")
    if "nats_per_mark" in numbers:
      lines.append(f"sentinels and ends of documents {numbers['nats_per_mark']:.4f} nats each")
    return lines


class Causal(Text):
  """The next token of a document, by a decoder."""

  models = ("decoder",)
  sampling = "continue"

  def stack_tokens(self) -> dict[str, tuple[str, int | None]]:
    return {"decoder": ("data.length", self.config.data.length)}

  def rows(self, tokenizer: Tokenizer) -> datasets.Rows:
    return datasets.CausalRows(self.config.data, tokenizer)


class SpanCorruption(Text):
  """The masked spans of a text, by an encoder-decoder (T5)."""

  models = ("seq2seq",)
  sampling = "fill"

  def stack_tokens(self) -> dict[str, tuple[str, int | None]]:
    data = self.config.data
    return {"encoder": ("data.length", data.length), "decoder": ("data.target_length", data.target_length)}

  def rows(self, tokenizer: Tokenizer) -> datasets.Rows:
    return datasets.SpanRows(self.config.data, tokenizer)

  def scored(self) -> str:
    return f"{super().scored()} noise_density={self.config.data.noise_density:g}"
