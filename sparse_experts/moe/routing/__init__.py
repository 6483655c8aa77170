"""What routers are made of: the list of assignments, its order, scores, losses, balanced assignment."""

from sparse_experts.moe.routing.assignments import Routing, Tokens, count_experts, slots
from sparse_experts.moe.routing.convention import Convention
from sparse_experts.moe.routing.order import by_token
from sparse_experts.moe.routing.router import CAUSALITY, Router, router_metrics
from sparse_experts.moe.routing.statistic import Loss, Pair, Statistic, as_pair
