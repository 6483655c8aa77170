"""Zero- and few-shot classification: a language model is asked for a text's label, with examples before it.

As GPT-3's (Brown et al. 2020, section 2.4): examples and text are put in the words of `data.prompt`, blank
lines between them, and the label counts whose words are the likeliest to follow. Nothing is trained. The
examples are the same for all texts, drawn from the source's training part by a seed, and those of fewer shots
are among those of more.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_experts.config import ConfigDict, replaced
from sparse_experts.data import Source
from sparse_experts.data.labelled import datasets, sources
from sparse_experts.errors import UserError
from sparse_experts.tasks import ranking, task_of
from sparse_experts.training.evaluate import Evaluator

BETWEEN = "\n\n"  # examples
FIGURES = ("accuracy", "accuracy_per_byte", "nats_per_label", "exact_match")


def open_source(config: ConfigDict, name: str) -> Source:
  """The labelled texts of the source called `name`, for a run of that config.

  A run on labelled texts has words for labels of its own, which need not be there.
  """
  asked = _asked(replaced(config, {"data.source": name}))
  return sources.open_source(asked.data, strict=config.data.objective != "text_classification")


def prompted(run: Any, source: Source, shots: Sequence[int], seed: int = 0,
             most: int | None = None) -> dict[str, float]:
  """{"few_shot/N/accuracy", ...} for each number of examples, as docs/measures.md defines `FIGURES`.

  run: on text, as `training.run.load` gives it. most: how many validation texts are asked, the first of the
  frozen list; all by default.
  """
  model, config = run.abstract_model("dropless"), _asked(run.config)
  if not ranking.is_possible(model):
    raise UserError("few-shot evaluation decodes with a cache, and a router of this run's decoder depends on "
                    "tokens that it lacks; choose a run whose routers have causality 'self'")
  check_shots(source, shots)
  trained_on = run.config.data.objective
  order = np.random.default_rng(seed).permutation(len(source.train))
  found: dict[str, float] = {}
  for n in sorted(set(shots)):
    chosen = [source.train[i] for i in order[:n]]
    rows = datasets.AnswerRows(
        config, run.tokenizer, length=config.model.context_length, sentinel=trained_on == "span_corruption",
        ends=trained_on == "text_classification")
    dataset = datasets.make_dataset(config, "valid", run.tokenizer, source, rows, ranked=True,
                                    before=examples(config.data.prompt, chosen, source.domains).encode())
    number = len(dataset) if most is None else min(most, len(dataset))
    numbers = Evaluator(model, config, run.mesh, dataset)(run.params, run.buffers, number, final=True)
    found |= {f"few_shot/{n}/{name}": numbers[name] for name in FIGURES}
    found |= {"few_shot/texts": number}
    found |= {f"few_shot/{name}": x for name, x in task_of(config).baselines(dataset, number).items()}
  return found


def check_shots(source: Source, shots: Sequence[int]) -> None:
  """Raises UserError if there are fewer training texts."""
  if max(shots) > len(source.train):
    raise UserError(f"{max(shots)} shots: the source has {len(source.train)} training texts; ask for so many "
                    "or fewer")


def examples(prompt: str, chosen: Sequence[dict], words: Sequence[str]) -> str:
  """The text of these examples, each with its label's words, as they stand before a prompt."""
  shown = (prompt.replace(datasets.PLACE, item["text"].decode(errors="replace")) + f" {words[item['label']]}"
           for item in chosen)
  return "".join(example + BETWEEN for example in shown)


def _asked(config: ConfigDict) -> ConfigDict:
  """The config of the task that the run is asked to do; its settings are checked."""
  config = replaced(config, {"data.objective": "text_classification"})
  task_of(config).check()
  return config
