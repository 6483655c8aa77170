"""Runs that several tests read, and a place for compiled programs that is not the user's."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.training.tiny import tiny_train


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
  """The same program is compiled once for all runs of this folder."""
  folder = str(tmp_path_factory.mktemp("compiled"))
  compilation_cache.reset_cache()  # jax looks for a cache once, at its first compilation
  jax.config.update("jax_compilation_cache_dir", folder)
  yield folder
  compilation_cache.reset_cache()
  jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """(workdir, run) of four uninterrupted steps on one device."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, tiny_train(workdir)
