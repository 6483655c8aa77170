"""What a person holds in a notebook: a run that says what it is, takes texts, and lets parameters be set."""

import jax
import numpy as np
import pytest

import sparse_experts
from sparse_experts.config import to_json
from sparse_experts.errors import UserError
from sparse_experts.models import names
from sparse_experts.moe import TopKRouter
from sparse_experts.training.setup import set_up
from tests.training.tiny import documents, tiny_config


def test_a_run_says_what_it_is(whole):
  shown = repr(whole[1])
  assert len(shown.splitlines()) <= 5 and len(shown) < 500
  for part in ("step 4 of 4", "8 experts, router top_k, in decoder/01", "data list", "expert=1, model=1"):
    assert part in shown, shown


def test_texts_become_the_batch_that_the_model_takes(whole):
  run = whole[1]
  batch = run.batch(["def import", b"class"])
  ids = batch["targets"]
  assert run.tokenizer.decode(ids[0][batch["weights"][0] > 0]).startswith("def import")
  assert run.tokenizer.decode(ids[1][batch["weights"][1] > 0]).startswith("class")
  logits, routings = run.model(batch, trace=True)
  assert logits.shape[:2] == (2, 32) and list(routings) == ["decoder/01"]
  np.testing.assert_array_equal(run.batch("class")["targets"][0], ids[1])
  with pytest.raises(UserError, match=r"text 1 has 2 rows of data.length=32 tokens; cut it into parts"):
    run.batch(["short", "x" * 60])
  for bad, message in (
      ({}, r"lacks decoder_inputs, segments, positions; the model reads .* run.batch\(texts\)"),
      (batch["targets"], "a batch is a dict of arrays decoder_inputs, segments, positions, not ndarray"),
      (batch | {"segments": batch["segments"][0]}, r"segments has shape \(32,\), wanted are \[rows, len"),
      (batch | {"positions": batch["positions"][:1]}, "positions has .* as many rows as decoder_inputs")):
    with pytest.raises(UserError, match=message):
      run.model(bad)


def test_parameters_are_read_and_set_by_name(whole):
  run = whole[1]
  found = run.parameters()
  assert {n: x.shape for n, x in found.items()} == names.state_shapes({"params": run.params,
                                                                       "buffers": run.buffers})
  name = "decoder/01/ffn/router/w"
  table = found["embedding/table"]
  changed = run.set_parameters({name: np.zeros(found[name].shape), "embedding/table": table})
  assert not changed.parameters()[name].any() and found[name].any(), "the first run stays"
  batch = run.batch(["def"])
  prob = changed.model(batch, trace=True)[1]["decoder/01"].prob
  np.testing.assert_allclose(prob[..., 0][prob.sum(-1) > 0], 1 / 8, rtol=1e-5)
  kept = {n: x for n, x in changed.parameters().items() if n != name}
  jax.tree.map(np.testing.assert_array_equal, kept, {n: found[n] for n in kept})
  for values, message in (({"decoder/01/ffn/router/v": 0}, "no parameter '.*router/v'; did you mean"),
                          ({name: np.zeros(3)}, r"has shape \(16, 8\), the value \(3,\); give it that shape"),
                          ({name: np.full((16, 8), np.nan)}, "is not finite everywhere")):
    with pytest.raises(UserError, match=message):
      run.set_parameters(values)


def test_arguments_of_the_wrong_kind_are_named(tmp_path):
  with pytest.raises(UserError, match=r"config='configs/smoke.py' is of type str, not a ConfigDict; give "
                                      r"sparse_experts.load_config\('configs/smoke.py'\)"):
    sparse_experts.train("configs/smoke.py", str(tmp_path))
  with pytest.raises(UserError, match="config=None is of type NoneType, not a ConfigDict; start from"):
    sparse_experts.train(None, str(tmp_path))
  with pytest.raises(UserError, match=r"router TopKRouter is a class; give an instance, such as TopKR"):
    sparse_experts.train(tiny_config(), tmp_path, router=TopKRouter, data=documents())


def test_the_package_says_what_it_has():
  assert sparse_experts.__version__ and all(hasattr(sparse_experts, name) for name in sparse_experts.__all__)
  assert sparse_experts.load_config("configs/smoke.py:dense").model.num_experts == 0


def test_a_router_that_could_not_learn_is_not_trained(tmp_path):
  """Gates renormalised over one choice; frozen, or in a run begun by an older version, it is fine."""
  alone = dict(model__router__gate="renormalized")
  with pytest.raises(UserError, match="layer decoder/01: the task would teach its router nothing: router.gate"
                     "='renormalized' with router.k=1 makes every gate 1; choose router.gate=raw, or"):
    set_up(tiny_config(**alone), str(tmp_path), data=documents())
  set_up(tiny_config(**alone, train__only="-*/router/*"), str(tmp_path), data=documents())
  set_up(tiny_config(**alone, model__router__k=2), str(tmp_path), data=documents())
  old = tiny_config(**alone, given__data="list")
  (tmp_path / "config.json").write_text(to_json(old))
  set_up(old, str(tmp_path), data=documents())
