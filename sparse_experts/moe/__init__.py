"""Sparse layers: Router -> Routing -> Dispatch(Experts)."""

from sparse_experts.moe.biased_experts import BiasedExperts
from sparse_experts.moe.capacity import CAPACITY_RULES, expert_capacity
from sparse_experts.moe.check import check_router, draws
from sparse_experts.moe.dispatch import DISPATCHES, Dispatch
from sparse_experts.moe.edits import force, reroute
from sparse_experts.moe.experts import ACTIVATIONS, Experts, get_activation
from sparse_experts.moe.heads import Heads, MultiHeadLayer
from sparse_experts.moe.layer import MoELayer
from sparse_experts.moe.linear_experts import LinearExperts
from sparse_experts.moe.mixtures.smear import SmearLayer
from sparse_experts.moe.mixtures.soft_moe import SoftMoELayer
from sparse_experts.moe.parallel import GatingDropout
from sparse_experts.moe.registry import LAYERS, ROUTERS, make_layer, make_router
from sparse_experts.moe.routers.top_k import TopKRouter
from sparse_experts.moe.routing import Convention, Router, Routing, Tokens, router_metrics
from sparse_experts.moe.ternary_experts import TernaryExperts
