"""LIMoE's claim: what is measured of tokens, reported and kept; the runs themselves are the package's."""

import json
import math

import numpy as np
import pytest

from experiments.limoe import __main__ as command
from experiments.limoe import measure, report, short
from sparse_experts.config import image_tokens, load_config, to_json
from sparse_experts.errors import UserError
from sparse_experts.validation import validate


def test_figures_of_tokens_by_hand():
  """Three tokens of one expert and one of another, one of them without a slot."""
  prob_TE = np.array([[1.0, 0, 0, 0]] * 2 + [[0.5, 0.5, 0, 0]] * 2)
  found = measure.of_tokens(prob_TE, np.array([0, 0, 0, 1]), np.array([True, True, False, True]))
  entropy = lambda *p: -sum(x * math.log(x) for x in p)
  shared = math.exp(entropy(0.75, 0.25))
  assert found == pytest.approx(
      {"local": math.log(2) / 2, "spread": shared, "experts": shared, "largest": 0.75, "success": 0.75})
  assert measure.of_tokens(prob_TE, np.array([2] * 4), np.ones(4))["experts"] == pytest.approx(1)


def figures(experts):
  of = {f"encoder/01/{m}/{name}": experts for m in ("text", "image") for name in report.FIGURES}
  return of | dict.fromkeys(report.WHOLE, 0.5)


def test_the_table():
  found = {"a": [figures(4.0), figures(6.0)], "b": [figures(1.0), figures(5.0)]}
  lines = report.table(found).splitlines()
  assert len(lines) == 2 + 2 * len(report.FIGURES) + len(report.WHOLE)
  # Differences 3 and 1: mean 2, deviation sqrt(2), half the interval 12.706 * 1.
  row = [cell.strip() for cell in lines[2].split("|")[1:-1]]
  assert row == ["experts used", "text", "encoder/01", "5.000 ± 1.414", "3.000 ± 2.828",
                 "+2.000 (-10.706 to +14.706)"]
  assert report.in_words(figures(4.0)).startswith("text uses 4.00 in encoder/01; 50.0% of images")


def test_what_is_done_is_kept(tmp_path):
  """Figures come from the folder of a run that has them, and are refused for another config."""
  config = load_config("experiments/limoe/config.py")
  (tmp_path / "config.json").write_text(to_json(config))
  (tmp_path / "figures.json").write_text(json.dumps({"nats_per_pair": 1.0}))
  assert command.figures(config, str(tmp_path)) == {"nats_per_pair": 1.0}
  with config.unlocked():
    config.train.seed = 1
  with pytest.raises(UserError, match="holds another config: train.seed=0 there and 1 here"):
    command.figures(config, str(tmp_path))


def test_arms_differ_in_weights_alone():
  load = lambda variant: load_config(f"experiments/limoe/config.py{variant}")
  configs = {arm: load(variant) for arm, variant in command.ARMS.items()}
  weights = {}
  for arm, config in configs.items():
    validate(config)
    assert config.model.group_size == 8 * (image_tokens(config) + config.data.length)
    config = config.to_dict()
    router = config["model"]["router"]
    weights[arm] = router.pop("local_weights", "own"), router.pop("global_weights", "own")
    configs[arm] = config
  assert configs["entropies"] == configs["classic"] == configs["local"]
  assert weights == {"entropies": ("own", "own"), "classic": ((0.0, 0.0), (0.0, 0.0)),
                     "local": ((0.0, 0.01), (0.0, 0.0))}


def test_short_captions():
  texts = {pair["text"] for pair in short.source(None)}
  assert b"red circle left of blue square" in texts
  assert {len(text.split()) for text in texts} == {5, 6}


def test_mistakes(capsys):
  assert command.main(["--steps=3"]) == 2
  assert "error: unrecognized arguments: --steps=3" in capsys.readouterr().err
