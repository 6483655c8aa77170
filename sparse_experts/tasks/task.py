"""What all tasks share: the class of an object that knows what a run is about."""

import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparse_experts.config import ConfigDict, mixture
from sparse_experts.data import Dataset, Record, Source, Vocabulary, make_tokenizer
from sparse_experts.errors import UserError

Pairs = dict[str, tuple[Any, Any]]  # (sum, count) by name; see `tasks/sums.py`

QUICK_RECORDS = 1000  # images or pairs


class Routed(NamedTuple):
  """The tokens that a sparse layer routes, in the rows of a batch."""

  id_BL: Any  # int32, in the vocabulary; -1 where a token is no text, as a patch
  segment_BL: Any  # int32, sequences of the row, numbered from 1; 0 for padding
  domain_BL: Any  # int32, numbers in `Task.domains`


class Forecasts(NamedTuple):
  """What a model expected of each target of each row, and what came; arrays [B, targets of a row]."""

  confidence: Any  # probability of the likeliest value, float32
  right: Any  # whether that was the target
  brier: Any  # see `sums.forecast`
  nats: Any  # -log p(target), as in the task's primary figure
  scored: Any  # whether the target counts


class Task:
  """A task of one run: its data, its sums over a batch, its primary figure, and how results are worded.

  A subclass sets the attributes and writes the methods that have no body here. Methods import jax themselves:
  a config is checked, and the primary figure known, before that. `vocabulary` is what `make_vocabulary` made.
  """

  models: tuple[str, ...]  # what `model.name` may be
  primary: str  # the figure that runs are compared by, a pair of `eval_sums`; the smaller the better
  # {how much was evaluated: the pair of `eval_sums` that counted it}; the first is named in `measure`.
  counts: Mapping[str, str]
  items: str  # what messages say the run is about
  sources: types.ModuleType  # open_source, as_source and split, as data/text/sources.py has them
  datasets: types.ModuleType  # make_dataset and example, as data/images/datasets.py has them
  sampling = ""  # how `sample` uses the model: continue | fill; empty: it writes no text
  forecasts_targets = False  # whether `evaluate --calibration` can compare forecasts with what came
  mixes = False  # whether data.source may be a mixture of several
  few_shot = ""  # what `evaluate --few_shot` tries on other data: features of images, labels of texts
  token_targets = False  # whether rows are tokens with a target each, whose losses `trace` and `replay` give
  rows_apart = True  # whether a row's loss depends on that row alone, as `regret` needs
  grouping = "domain"  # what `Task.domains` are: domain, class or modality
  word_tokenizer = False  # whether texts are only read, so that data.tokenizer=words will do

  def __init__(self, config: ConfigDict):
    self.config = config

  @property
  def has_softmax(self) -> bool:
    """Whether each target is predicted by one softmax over all values."""
    return True

  @property
  def unit(self) -> str:
    """The primary figure's name in words, such as "nats per byte"."""
    return self.primary.replace("_", " ")

  # The config

  def check(self) -> None:
    """Raises UserError for what the task refuses in the config; before jax is imported."""
    if mixture.parse(self.config.data.source) and not self.mixes:
      raise UserError(f"data.source='{self.config.data.source}' mixes texts, and this task is on "
                      f"{self.items}; choose one source, or data.objective=causal or span_corruption")
    if self.config.data.tokenizer == "words" and not self.word_tokenizer:
      raise UserError("data.tokenizer='words' loses the spaces of a text, so it is for model.name='limoe' "
                      "only; choose bytes or sentencepiece:SIZE")

  def stack_tokens(self) -> dict[str, tuple[str, int | None]]:
    """{"encoder" | "decoder": (what sets it, tokens of a row)}, by the config alone; None: not known yet."""
    raise NotImplementedError

  # The data

  def open_source(self) -> Source:
    """What `config.data.source` names, in two parts."""
    return self.sources.open_source(self.config.data)

  def as_source(self, data: Any, **keys: Any) -> Source:
    """A user's own data: a sequence, or an object with `.train` and `.valid`."""
    return self.sources.as_source(data, self.config.data, **keys)

  def describe_source(self, source: Source) -> str:
    """What was found, for the first lines of `train`; empty: there is nothing to say."""
    return ""

  def hold_out(self, source: Source) -> Source:
    """A source of its training data alone, of which `config.data.valid_share` is held out: to choose by."""
    data = self.config.data
    train, valid = self.sources.split(source.train, data.valid_share, data.source)
    return self.as_source(types.SimpleNamespace(train=train, valid=valid, domains=source.domains))

  def make_vocabulary(self, source: Source | None = None) -> Vocabulary:
    """What the model's ids stand for; the source is opened if it is needed and not given."""
    name = self.config.data.tokenizer
    if source is None and name.partition(":")[0] in ("sentencepiece", "words"):
      source = self.open_source()
    return make_tokenizer(name, None if source is None else (item["text"] for item in source.train))

  def read_vocabulary(self, saved: bytes) -> Vocabulary:
    """What its `serialize` wrote."""
    return make_tokenizer(saved)

  def make_dataset(self, split: str, vocabulary: Any, source: Source) -> Dataset:
    """The records of `source.train` or `source.valid`: see `data/dataset.py`."""
    return self.datasets.make_dataset(self.config, split, vocabulary, source)

  def example(self, vocabulary: Any) -> Record:
    """A made-up record, no data being read: names, shapes and types are those of all training records."""
    return self.datasets.example(self.config, vocabulary)

  def row_lengths(self, vocabulary: Any) -> dict[str, int]:
    """Tokens that an encoder (0: none) and a decoder see of a row: `encoder`, `targets`."""
    tokens = {stack: number or 0 for stack, (_, number) in self.stack_tokens().items()}
    return {"encoder": tokens.get("encoder", 0), "targets": tokens.get("decoder", 0)}

  # What its sparse layers route

  def routed(self, layer: str, batch: dict[str, Any]) -> Routed:
    """The tokens that the sparse layer of that name sees of a batch."""
    raise NotImplementedError

  def domains(self, vocabulary: Any, source: Source) -> Sequence[str]:
    """What `Routed.domain_BL` numbers: domains of documents, classes of images, modalities."""
    return source.domains

  def places(self, layer: str, length: int) -> list[str]:
    """A name for each of the `length` positions of a row; neighbours share one."""
    return spans(length)

  def patch(self, record: Record, position: int) -> Any:
    """A picture of an image's token, uint8 [H, W, 3]; None for a token that is no patch."""
    return None

  # Sums over a batch

  def train_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any], key: Any = None,
                 ) -> dict[str, Any]:
    """{"loss": the pair that is minimised, "layers": `sums.layer_sums`}.

    The counts depend on the batch's masks alone, never on parameters.
    """
    raise NotImplementedError

  def eval_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any]) -> Pairs:
    """The figures of one batch without noise, by the name they are reported by, and those of its layers."""
    raise NotImplementedError

  def final_sums(self, model: Any, params: Any, buffers: Any, batch: dict[str, Any]) -> Pairs:
    """`eval_sums` of the final evaluation and of `evaluate`: with what would be too slow while training."""
    return self.eval_sums(model, params, buffers, batch)

  def target_losses(self, logits: Any, batch: dict[str, Any]) -> Any:
    """Nats of each target of each row, [B, targets of a row], 0 where there is none; if `rows_apart`."""
    raise NotImplementedError

  def forecasts(self, logits: Any, batch: dict[str, Any]) -> Forecasts:
    """Of each target that the primary figure counts; if `forecasts_targets`."""
    raise NotImplementedError

  def check_forecasts(self) -> None:
    """Raises UserError where targets are not forecast one by one."""
    if not self.forecasts_targets:
      raise UserError(f"calibration is of text or of images with classes, and the model reads {self.items}; "
                      "choose another run, or leave --calibration out")

  # An evaluation

  @property
  def set_size(self) -> int | None:
    """How many records are evaluated together, where the figures depend on it; None: they do not."""
    return None

  def evaluated_records(self, dataset: Dataset) -> int:
    """How many validation records the final evaluation takes."""
    return dataset.num_windows

  def quick_records(self, dataset: Dataset) -> int:
    """How many of them `evaluate --quick` takes: about `QUICK_RECORDS`, in whole sets."""
    most = min(self.evaluated_records(dataset), QUICK_RECORDS)
    return most - most % self.set_size if self.set_size and most > self.set_size else most

  def baselines(self, dataset: Dataset, num_records: int) -> dict[str, float]:
    """Figures of the evaluated records that the model's are read against; none by default."""
    return {}

  def measure(self, numbers: dict[str, Any] | None = None) -> str:
    """What the primary figure is a figure of; runs whose measures differ are not to be compared.

    Without `numbers`, before an evaluation: with what the config asks for in place of what was counted.
    """
    name = next(iter(self.counts))
    return f"{self.primary} {self.scored()} {name}={self.asked if numbers is None else numbers[name]}"

  def scored(self) -> str:
    """The part of `measure` that the config sets: the objective and what its figure depends on."""
    raise NotImplementedError

  @property
  def asked(self) -> int:
    """The least count of an evaluation that the config asks for; 0: all there is."""
    return 0

  # Wording

  def reads(self, vocab_size: int) -> str:
    """What `describe` says that the model reads."""
    raise NotImplementedError

  def figure(self, numbers: dict[str, Any], prefix: str = "") -> str:
    """The primary figure with its unit, of numbers whose names start with `prefix`."""
    return f"{numbers.get(prefix + self.primary, math.nan):.4f} {self.unit}"

  def summary(self, numbers: dict[str, Any]) -> list[str]:
    """Lines on the final evaluation, the primary figure first."""
    return [f"validation loss {self.figure(numbers)}, dropless, on "
            + ", ".join(f"{numbers[name]:,} {name}" for name in self.counts)]


def spans(length: int, most: int = 8, word: str = "") -> list[str]:
  """A name for each position of a row: its span, of at most `most` equal ones; "0-31", ..."""
  edges = sorted({i * length // most for i in range(most)})
  names = []
  for first, end in zip(edges, [*edges[1:], length]):
    names += [word + (str(first) if end == first + 1 else f"{first}-{end - 1}")] * (end - first)
  return names
