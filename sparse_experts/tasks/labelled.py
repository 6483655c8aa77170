"""Text classification cast as text-to-text (T5): the model reads a text and writes its label in words."""

import collections
import math
import types
from typing import Any

from sparse_experts.config import ConfigDict
from sparse_experts.data import Dataset, Record, Source, Tokenizer
from sparse_experts.data.labelled import datasets, sources
from sparse_experts.errors import UserError
from sparse_experts.tasks.task import Pairs, Routed
from sparse_experts.tasks.text import TokenTargets


class TextClassification(TokenTargets):
  """The loss is of the label's tokens alone. At the end all labels are ranked by their log-likelihood."""

  models = ("decoder", "seq2seq")
  primary = "nats_per_answer"
  counts = types.MappingProxyType({"texts": "nats_per_answer"})
  items = "labelled texts"
  grouping = "class"
  sources = sources

  def __init__(self, config: ConfigDict):
    super().__init__(config)
    self.sampling = "continue" if config.model.name == "decoder" else ""

  def check(self) -> None:
    super().check()
    data = self.config.data
    if data.tokenizer.startswith("vocabulary:"):
      raise UserError(f"data.tokenizer='{data.tokenizer}' has no words for labels; choose bytes, "
                      "sentencepiece:SIZE or the tokenizer.model of a run")
    datasets.check_prompt(data.prompt)
    sources.words(data.label_words, set())

  def stack_tokens(self) -> dict[str, tuple[str, int | None]]:
    data = self.config.data
    if self.config.model.name == "decoder":
      return {"decoder": ("data.length", data.length)}
    return {"encoder": ("data.length", data.length),
            "decoder": ("data.target_length", data.target_length or datasets.TARGET_LENGTH)}

  def make_dataset(self, split: str, vocabulary: Tokenizer, source: Source) -> Dataset:
    rows = datasets.AnswerRows(self.config, vocabulary)
    return datasets.make_dataset(self.config, split, vocabulary, source, rows, ranked=split == "valid")

  def example(self, vocabulary: Tokenizer) -> Record:
    return datasets.example(datasets.AnswerRows(self.config, vocabulary))

  def describe_source(self, source: Source) -> str:
    return (f"{len(source.train) + len(source.valid):,} labelled texts, {len(source.domains)} labels, "
            f"{len(source.train):,} to train on")

  def routed(self, layer: str, batch: dict[str, Any]) -> Routed:
    """The domain is the text's label, which no router sees."""
    return super().routed(layer, batch | {"domain": batch["label"]})

  def eval_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any]) -> Pairs:
    """`exact_match`: of texts whose answer greedy decoding writes: each of its tokens is the likeliest."""
    import jax.numpy as jnp

    from sparse_experts.tasks import sums

    logits_BLV, routings = model.apply(params, buffers, batch)
    weight_BL = batch["weights"]
    answer_BL, real_B = weight_BL > 0, (weight_BL > 0).any(-1)
    ce_BL = jnp.where(answer_BL, sums.cross_entropy(logits_BLV, batch["targets"]), 0.0)
    right_B = ((logits_BLV.argmax(-1) == batch["targets"]) | ~answer_BL).all(-1).astype(jnp.float32)
    return {"loss": sums.over(ce_BL, answer_BL), "nats_per_answer": sums.over(ce_BL.sum(-1), real_B),
            "exact_match": sums.over(right_B, real_B)} | sums.flat(sums.layer_sums(routings))

  def final_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any]) -> Pairs:
    """With the ranking, except of models that cannot decode with a cache."""
    from sparse_experts.tasks import ranking

    found = self.eval_sums(model, params, buffers, batch)
    return found | (ranking.sums(model, params, buffers, batch) if ranking.is_possible(model) else {})

  def baselines(self, dataset: Dataset, num_records: int) -> dict[str, float]:
    """`majority`: the share of the most frequent label among the very texts that are evaluated."""
    number = min(num_records, len(dataset))
    count = collections.Counter(int(dataset[i]["label"]) for i in range(number))
    return {"majority": max(count.values()) / number}

  def scored(self) -> str:
    data = self.config.data
    return f"text_classification length={data.length} prompt={data.prompt!r}"

  def figure(self, numbers: dict[str, Any], prefix: str = "") -> str:
    return (f"{super().figure(numbers, prefix)}, exact match "
            f"{numbers.get(prefix + 'exact_match', math.nan):.2%}")

  def summary(self, numbers: dict[str, Any]) -> list[str]:
    ranked = f"accuracy {numbers['accuracy']:.2%} of ranked labels, " if "accuracy" in numbers else ""
    return [*super().summary(numbers), f"{ranked}the most frequent label has {numbers['majority']:.2%}"]
