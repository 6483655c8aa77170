"""Ternary experts are packed four a byte and read back equal."""

import json

import numpy as np
import pytest

from sparse_experts import cli
from sparse_experts.convert import ternary
from sparse_experts.errors import UserError
from sparse_experts.models import names
from sparse_experts.moe.ternary_experts import codes
from tests.training.tiny import tiny_train


@pytest.mark.parametrize("shape", [(2, 4, 6), (3, 3, 5), (1, 1, 1)])
def test_four_codes_a_byte(shape):
  code = np.random.default_rng(0).integers(-1, 2, shape).astype(np.float32)
  packed = ternary.pack(code)
  assert packed.dtype == np.uint8 and packed.shape == (shape[0], -(-shape[1] * shape[2] // 4))
  np.testing.assert_array_equal(ternary.unpack(packed, shape), code)


def test_the_first_weight_is_in_the_lowest_bits():
  assert ternary.pack(np.array([[[-1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]])).tolist() == [
      [0 + (1 << 2) + (2 << 4) + (1 << 6), 2 + (2 << 2) + (1 << 4) + (1 << 6)]]


@pytest.mark.parametrize("byte, shape", [([[3]], (1, 1, 1)), ([[0, 0]], (1, 1, 1))])
def test_other_bytes_are_refused(byte, shape):
  with pytest.raises(UserError, match="are not of ternary weights"):
    ternary.unpack(np.array(byte, np.uint8), shape)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(work directory, run) of a step with ternary experts of sub-tokens."""
  workdir = tmp_path_factory.mktemp("ternary") / "run"
  run = tiny_train(workdir, model__expert_weights="ternary", model__moe_heads=2, train__steps=1)
  return workdir, run


def test_what_is_written_is_what_the_run_multiplies_by(trained, tmp_path, capsys):
  workdir, run = trained
  folder = tmp_path / "packed"
  assert cli.main(["convert", f"--workdir={workdir}", f"--to={folder}", "--layout=ternary"]) == 0
  assert "experts in 2 bits a weight" in capsys.readouterr().out
  arrays = names.by_path(run.params)
  own = {name: np.asarray(arrays[at.path] if at.repeat is None else arrays[at.path][at.repeat])
         for name, at in names.places(run.params).items()}
  found = ternary.read(str(folder))
  assert found.keys() == own.keys()
  packed = [name for name in own if "/experts/" in name]
  assert len(packed) == 3
  for name, array in own.items():
    code, value = map(np.asarray, codes(array)) if name in packed else (array, 1.0)
    np.testing.assert_array_equal(found[name], code * value, err_msg=name)
  size = (folder / "model.safetensors").stat().st_size
  plain = 4 * sum(a.size for name, a in own.items() if name not in packed)
  of_experts = sum(a.size / 4 + 4 * len(a) for name, a in own.items() if name in packed)
  assert size == pytest.approx(plain + of_experts, rel=0.1)  # besides the header
  content = json.loads((folder / "config.json").read_text())
  assert content["model_type"] == "ternary" and content["config"]["model.moe_heads"] == 2


def test_another_folder_is_refused(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
  with pytest.raises(UserError, match="config.json is not of ternary experts; name a folder that convert"):
    ternary.read(str(tmp_path))
