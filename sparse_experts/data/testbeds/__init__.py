"""Testbeds: generated streams that never repeat, of known entropy and known best routing."""

from sparse_experts.data.testbeds.clusters import Clusters
from sparse_experts.data.testbeds.stream import Stream

STREAMS: dict[str, Stream] = {"clusters": Clusters()}
