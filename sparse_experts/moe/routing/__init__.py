"""What routers are made of: the list of assignments, its order, scores, losses, balanced assignment."""

from sparse_experts.moe.routing.assignments import Pair, Routing, Tokens, by_token, count_experts, slots
from sparse_experts.moe.routing.convention import Convention
from sparse_experts.moe.routing.router import CAUSALITY, Router, router_metrics
