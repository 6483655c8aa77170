"""Foreign checkpoints and runs at addresses."""

import pathlib

import numpy as np
import pytest

from sparse_experts import storage
from sparse_experts.convert.read import read
from sparse_experts.convert.write import write
from sparse_experts.errors import UserError
from sparse_experts.storage import objects
from sparse_experts.training.run import load
from tests.convert.checkpoints import DATA, tensors


def test_from_a_store_to_a_store_and_back(bucket):
  objects.put_folder(str(DATA / "mixtral"), f"{bucket}/hf")
  summary = read(f"{bucket}/hf", f"{bucket}/run")
  assert summary.layout == "mixtral" and load(f"{bucket}/run").step == 0
  assert storage.is_complete(f"{bucket}/run/checkpoints/0")
  assert write(f"{bucket}/run", f"{bucket}/again/", "mixtral") == 0
  before = tensors(DATA / "mixtral")
  with storage.fetched(f"{bucket}/again") as folder:
    after = tensors(pathlib.Path(folder))
    assert before.keys() == after.keys()
    for name, a in before.items():
      np.testing.assert_array_equal(after[name], a, err_msg=name)
  with pytest.raises(UserError, match=f"--to={bucket}/again is there and not empty; name a new folder"):
    write(f"{bucket}/run", f"{bucket}/again", "mixtral")
  with pytest.raises(UserError, match=f"workdir {bucket}/run holds a run; name another folder"):
    read(f"{bucket}/hf", f"{bucket}/run")


def test_messages_name_the_address(bucket):
  objects.put_folder(str(DATA / "mixtral"), f"{bucket}/hf")
  storage.write(f"{bucket}/hf/config.json", "{}")
  with pytest.raises(UserError, match=f"{bucket}/hf/config.json"):
    read(f"{bucket}/hf", f"{bucket}/run")
  with pytest.raises(UserError, match="workdir s3://bucket/run: runs are kept in folders"):
    read(f"{bucket}/hf", "s3://bucket/run")
