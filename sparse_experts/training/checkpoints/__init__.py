"""Checkpoints of a run: saved in the background, verified by checksums when they are read."""

from sparse_experts.training.checkpoints.manager import Checkpoints
from sparse_experts.training.checkpoints.steps import Steps
