"""Runs of sweeps share compiled programs, away from the user's."""

from tests.training.conftest import compiled_programs  # noqa: F401  a fixture
