"""Expert cards of tiny runs: of text, of images, of pairs, and of what cannot be measured."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from sparse_experts.errors import UserError
from sparse_experts.report import cards as report_cards
from sparse_experts.report import expert_cards, measure
from sparse_experts.report.cards import cards
from tests.report import made_up
from tests.report.written_run import write_run
from tests.tasks.test_images import digits_config
from tests.tasks.test_pairs import pairs_config
from tests.training.tiny import documents, tiny_config


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """(workdir of a tiny decoder with checkpoints of steps 2 and 4, its cards)."""
  config = tiny_config(model__router__k=2, model__moe_every=1)
  workdir = write_run(tmp_path_factory.mktemp("text"), config, data=documents())
  return workdir, cards(workdir, data=documents())


def finite(x):
  """Every number of nested lists and dicts."""
  values = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
  return [x] if isinstance(x, int | float) else [n for value in values for n in finite(value)]


@pytest.mark.slow
def test_cards_of_text(text):
  workdir, found = text
  assert json.loads(json.dumps(found)) == found and np.isfinite(finite(found)).all()
  assert (found["step"], found["unit"], found["grouping"]) == (4, "nats per byte", "domain")
  assert found["tokens"] <= measure.TOKENS and not found["other_data"]
  assert found["rerouting"]["cost"] == found["rerouting"]["random"] - found["rerouting"]["loss"]
  assert found["model"]["rows"][1][:5] == ["decoder/01", "sparse", "32", "8", "2"]
  assert [layer["name"] for layer in found["layers"]] == ["decoder/00", "decoder/01"]
  for layer in found["layers"]:
    assert layer["why_missing"] is None and layer["saturation"]["share"][-1] == 1.0
    assert layer["saturation"]["step"] == [2, 4]
    assert 0 <= layer["regret"]["chosen_best"] <= 1 and layer["regret"]["saved"] >= 0
    each = layer["expert_cards"]
    assert [card["expert"] for card in each] == list(range(8))
    assert sum(card["assignments"] for card in each) == 2 * found["tokens"]
    assert sum(card["share"] for card in each) == pytest.approx(1, abs=1e-3)
    for card in each:
      for token in card["tokens"]:
        assert token["share"] > card["share"] and token["lift"] == pytest.approx(
            token["share"] / card["share"], rel=1e-2)
      assert len(card["examples"]) == expert_cards.MOST_EXAMPLES and not card["patches"]
      assert {example["token"] for example in card["examples"][:len(card["tokens"])]} <= {
          token["text"] for token in card["tokens"]}
      assert set(card["profiles"]) == set(card["reliability"]) == {"domain", "position", "token class"}
      assert sum(row["share"] for row in card["profiles"]["position"]) == pytest.approx(1, abs=1e-3)
      # Documents have one domain, which has no profile that could correlate.
      assert set(card["reliability"]["domain"].values()) == {None}
    assert layer["information"]["token class"]["trained"] > layer["information"]["token class"]["permuted"]
  assert any(card["tokens"] for card in found["layers"][0]["expert_cards"])


@pytest.mark.slow
def test_they_are_kept_until_a_checkpoint_changes(text, tmp_path):
  """Read again without jax; measured again after another step, and the old file goes."""
  workdir, found = text
  code = (f"import sys; from sparse_experts.report.cards import cards; found = cards({workdir!r}); "
          f"sys.exit(found['checkpoint'] != {found['checkpoint']!r} or 'jax' in sys.modules)")
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
  changed = tmp_path / "run"
  shutil.copytree(workdir, changed)
  (old,) = (changed / "report_cache").iterdir()
  shutil.rmtree(changed / "checkpoints" / "2")
  again = cards(str(changed), data=documents())
  assert again["checkpoint"] != found["checkpoint"] and not old.exists()
  assert again["layers"][0]["saturation"] is None  # one checkpoint is left
  for name in ("expert_cards", "regret", "information"):  # the rest is the same
    assert again["layers"][1][name] == found["layers"][1][name]


def test_the_newest_checkpoint_and_some_before_it():
  """As many as there is room for, with the untrained routers'."""
  assert measure._choose(list(range(0, 2000, 100)), 1) == [0, 300, 500, 800, 1100, 1400, 1600, 1900]
  assert measure._choose([100, 200, 300], measure.ASSIGNMENTS // 3) == [100, 300]
  assert measure._choose([100, 200, 300], measure.ASSIGNMENTS) == [300]


def test_a_run_without_checkpoints(tmp_path):
  (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
  with pytest.raises(UserError, match="checkpoints holds no checkpoint; train the run first"):
    report_cards.cards(str(tmp_path))


@pytest.mark.parametrize("given, call", [
    (dict(router="Mine"), "with router given in Python; .* cards.cards\\('.*run', router=Mine\\(...\\)\\)`"),
    (dict(data="list"), "with data given in Python; .* cards.cards\\('.*run', data=...\\)`"),
    (dict(router="Mine", data="list"), "with router and data given .*, router=Mine\\(...\\), data=...\\)`")])
def test_a_run_of_what_python_gave_is_measured_there(tmp_path, given, call):
  """Not with the config's router or on other text, which would be cards of something else."""
  keys = {f"given.{name}": value for name, value in given.items()}
  folder = str(made_up.write_run(tmp_path / "run", rows=1, keys=keys))
  with pytest.raises(UserError, match=call):
    report_cards._check_given(folder, None, None)
  report_cards._check_given(folder, ["a text"], "a router")


@pytest.mark.slow
def test_a_run_of_a_larger_mesh_is_loaded_on_what_there_is(tmp_path, text):
  """As if it had been trained on 16 devices, where there are 8."""
  shutil.copytree(text[0], tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "report_cache")
  path = tmp_path / "run" / "config.json"
  config = json.loads(path.read_text())
  config["mesh"] |= {"data": 2, "expert": 8}
  path.write_text(json.dumps(config))
  found = cards(str(tmp_path / "run"), data=documents())
  for layer, expected in zip(found["layers"], text[1]["layers"]):
    assert [card["assignments"] for card in layer["expert_cards"]] == [
        card["assignments"] for card in expected["expert_cards"]]


@pytest.mark.slow
def test_cards_of_images(tmp_path):
  found = cards(write_run(tmp_path, digits_config()))
  (layer,) = found["layers"]
  assert found["grouping"] == "class" and found["unit"] == "nats per image"
  assert found["tokens"] == found["records"] * 5  # 4 patches and a class token
  assert layer["regret"]["tokens"] > 0
  for card in layer["expert_cards"]:
    assert not card["tokens"] and not card["examples"]
    assert set(card["profiles"]) == {"class", "position"}
    assert {row["name"] for row in card["profiles"]["position"]} > {"class token", "row 0, column 1"}
    assert all(patch.startswith("data:image/png;base64,") for patch in card["patches"])
  assert sum(len(card["patches"]) for card in layer["expert_cards"]) > 8


@pytest.mark.slow
def test_cards_of_pairs(tmp_path):
  found = cards(write_run(tmp_path, pairs_config()))
  (layer,) = found["layers"]
  assert found["records"] % pairs_config().eval.batch_size == 0
  assert layer["regret"] is None and "is of a whole batch" in layer["why_missing"]
  names = {row["name"] for card in layer["expert_cards"] for row in card["profiles"]["modality"]}
  assert names == {"image", "text"}
  words = {token["text"] for card in layer["expert_cards"] for token in card["tokens"]}
  assert words and words <= set("a small big red green blue yellow purple black circle square triangle cross "
                                "above below left right of".split())
  assert any(card["patches"] for card in layer["expert_cards"])


@pytest.mark.slow
@pytest.mark.parametrize("router, experts", [("soft_moe", 4), ("top_k", 0)])
def test_layers_that_assign_nothing_say_so(tmp_path, router, experts):
  """Beside layers that do; a dense run has no layers at all."""
  config = tiny_config(
      model__name="seq2seq", data__objective="span_corruption", data__target_length=12, data__mean_span=5.0,
      model__num_experts=experts, model__router__name=router, model__decoder__router__name="top_k",
      model__decoder__num_experts=2 * experts, model__decoder__group_size=24)
  found = cards(write_run(tmp_path, config, data=documents()), data=documents())
  assert found["rerouting"] is None and len(found["model"]["rows"]) == 4
  if not experts:
    assert not found["layers"]
    return
  encoder, decoder = found["layers"]
  assert "it mixes all of them" in encoder["why_missing"] and not encoder["expert_cards"]
  assert len(decoder["expert_cards"]) == 8 and decoder["regret"] is None and decoder["why_missing"]
