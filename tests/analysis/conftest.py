"""Compiling is most of what these tests do; at its lowest level it takes a third of the time."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def compiled_quickly():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
