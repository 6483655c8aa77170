"""Foreign checkpoints give the logits that their own code gave, and come out again as they went in.

transformers wrote them and computed the logits: make_reference.py.
"""

import functools

import numpy as np
import pytest

from sparse_experts.convert.read import read
from sparse_experts.convert.write import write
from sparse_experts.train import workdir as wd
from sparse_experts.train.checkpoints import Checkpoints
from sparse_experts.train.run import load
from tests.convert.checkpoints import DATA, NAMES, config_of, reference, tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """name -> work directory of that reference checkpoint, read once."""
  @functools.cache
  def run(name):
    workdir = tmp_path_factory.mktemp("run") / name
    read(str(DATA / name), str(workdir))
    return workdir

  return run


def arrays(workdir, folder):
  folder.mkdir()
  with Checkpoints(wd.checkpoints(str(workdir))) as checkpoints:
    return checkpoints.restore_mapped(("params", "buffers"), 0, str(folder))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, runs):
  batch, expected = reference(name)
  assert expected.std() > 0.5
  logits, _ = load(str(runs(name))).model(batch)  # XLA:CPU's quicker levels take minutes for these widths
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(name, runs, tmp_path):
  """Names, shapes, types and values of each tensor; and read again, each bit of the parameters."""
  written = tmp_path / "hf"
  write(str(runs(name)), str(written), config_of(name)["model_type"])
  before, after = tensors(DATA / name), tensors(written)
  describe = lambda found: {key: (a.shape, a.dtype) for key, a in found.items()}
  assert describe(after) == describe(before)
  if name != "deepseek_v3_yarn":  # which holds halves where pairs are written
    for key, a in before.items():
      np.testing.assert_array_equal(after[key], a, err_msg=key)
  read(str(written), str(tmp_path / "again"))
  own, again = arrays(runs(name), tmp_path / "a"), arrays(tmp_path / "again", tmp_path / "b")
  assert own.keys() == again.keys()
  for key, a in own.items():
    np.testing.assert_array_equal(again[key], a, err_msg=key)
