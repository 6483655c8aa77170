"""Profiled runs share compiled programs, away from the user's; one is compared to a plain run."""

from tests.training.conftest import compiled_programs, whole  # noqa: F401  fixtures
