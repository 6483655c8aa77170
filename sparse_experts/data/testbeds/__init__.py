"""Testbeds: generated streams that never repeat, of known entropy and known best routing."""

from sparse_experts.data.testbeds.clusters import Clusters
from sparse_experts.data.testbeds.composites import Composites
from sparse_experts.data.testbeds.facts import Facts
from sparse_experts.data.testbeds.languages import Languages
from sparse_experts.data.testbeds.stream import Stream

STREAMS: dict[str, Stream] = {
    "clusters": Clusters(),
    "facts_and_arithmetic": Facts(),
    "facts": Facts(arithmetic=0),
    "arithmetic": Facts(arithmetic=8),
    "languages": Languages(),
    "composites": Composites(),
}
