"""Two-layer patch networks, alone and as experts behind a router whose tokens are whole examples.

Letters, besides those of `data.py`: C = 2 classes, E experts, F filters of one, M = N·L patches.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.understanding_moe.data import L, W
from sparse_experts.errors import UserError, nearest
from sparse_experts.moe import Router, Routing, Tokens
from sparse_experts.moe.grouped import rows
from sparse_experts.moe.grouped.matmul import grouped_matmul
from sparse_experts.moe.routing import lists, scores

GATES = ("softmax", "raw")
CLASSES = 2


class NoisyTopOne(Router):
  """One expert per example: the largest of (sum of patches) w + noise, U(0, 1) per example and expert.

  gate: `softmax`, the chosen expert's probability by the noisy scores, as the paper defines it; `raw`, its
    noisy score itself, as in the authors' synthetic notebooks, whose output is the published table.
  """

  def __init__(self, num_experts: int, gate: str = "softmax"):
    if gate not in GATES:
      raise UserError(f"gate='{gate}' is unknown{nearest(gate, GATES)}")
    self.num_experts, self.gate = num_experts, gate
    self.causality, self.drop_causality = "self", "past"
    # Zero: at first noise alone decides.
    self.w = nnx.Param(jnp.zeros((W, num_experts)), axes=("embed", "router"))

  def __call__(self, x_GTD, tokens, capacity, key=None):
    del capacity
    G, T, _ = x_GTD.shape
    score_GTE = scores.linear(x_GTD.reshape(G, T, L, W).sum(2), self.w[...])
    if key is not None:
      score_GTE += jax.random.uniform(key, score_GTE.shape)
    expert_GTK, gate_GTK = scores.top_k(score_GTE, 1)
    prob_GTE = jax.nn.softmax(score_GTE, axis=-1)
    if self.gate == "softmax":
      gate_GTK = jnp.take_along_axis(prob_GTE, expert_GTK, axis=-1)
    return lists.token_choice(expert_GTK, gate_GTK, prob_GTE, tokens.mask, order="token")


class FilterBanks(nnx.Module):
  """Per expert, a bank of filters shared over the patches: y_c = Σ_patches Σ_{filters of c} act(w patch + b).

  The first half of an expert's filters is for class 0, the second for class 1. Weights and biases:
  U(±1/sqrt(W)), PyTorch's default for a convolution, times `init_scale`.
  """

  def __init__(self, num_experts: int, filters: int, activation: str, init_scale: float, *, rngs: nnx.Rngs):
    self.num_experts, self.filters, self.activation = num_experts, filters, activation
    bound = init_scale / W**0.5
    init = lambda *shape: jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
    self.w = nnx.Param(init(num_experts, W, filters), axes=("expert", "embed", "mlp"))
    self.b = nnx.Param(init(num_experts, filters), axes=("expert", "mlp"))

  def __call__(self, x_ND: Array, expert_N: Array | None = None) -> Array:
    """Classes of each example by its expert, _NC; without `expert_N` by the only one."""
    if self.activation == "linear":
      y_NEC = self._linear(x_ND)
      chosen_N = jnp.zeros(x_ND.shape[0], jnp.int32) if expert_N is None else expert_N
      return jnp.take_along_axis(y_NEC, chosen_N[:, None, None], axis=1)[:, 0]
    if expert_N is None:
      return self._cubic(x_ND.reshape(-1, W) @ self.w[...][0], self.b[...])
    order_N = jnp.argsort(expert_N, stable=True)
    sent_NE = jax.nn.one_hot(expert_N[order_N], self.num_experts)
    z_MF = grouped_matmul(x_ND[order_N].reshape(-1, W), self.w[...], L * sent_NE.sum(0).astype(jnp.int32))
    y_NC = self._cubic(z_MF, sent_NE @ self.b[...])
    return rows.move(y_NC, jnp.argsort(order_N), order_N[:, None])

  def _linear(self, x_ND: Array) -> Array:
    """All experts', _NEC. Sums commute with linear filters: one per class, on the sum of patches, will do."""
    w_WEC = self.w[...].swapaxes(0, 1).reshape(W, self.num_experts, CLASSES, -1).sum(-1)
    b_EC = L * self.b[...].reshape(self.num_experts, CLASSES, -1).sum(-1)
    return jnp.einsum("nw,wec->nec", x_ND.reshape(-1, L, W).sum(1), w_WEC) + b_EC[None]

  def _cubic(self, z_MF: Array, b_NF: Array) -> Array:
    z_NLF = z_MF.reshape(-1, L, z_MF.shape[-1]) + b_NF[:, None]
    y_NF = (z_NLF * z_NLF * z_NLF).sum(1)
    return y_NF.reshape(y_NF.shape[0], CLASSES, -1).sum(-1)


class Mixture(nnx.Module):
  """Class scores of each example: those of the expert its router chose, times the gate.

  `MoELayer` gives the same, with rows of classes padded to the width of an example: 2.5 ms of a core for
  1,000 examples forward and backward, cubic, against 1.5 here (the least of 100 calls on a busy machine).
  Evaluating all experts takes 2.4 ms.
  """

  def __init__(self, router: NoisyTopOne, experts: FilterBanks):
    self.router, self.experts = router, experts

  def __call__(self, x_ND: Array, key: Array | None = None) -> tuple[Array, Routing]:
    """(class_NC, routing of one group)."""
    routing = self.router(x_ND[None], Tokens(mask=jnp.ones((1, x_ND.shape[0]), bool)), None, key)
    # The list has one assignment per example, in the examples' order.
    return self.experts(x_ND, routing.expert[0]) * routing.gate[0][:, None], routing


def mixture(activation: str, gate: str, *, rngs: nnx.Rngs) -> Mixture:
  """Eight experts of 16 filters, of small initial weights."""
  return Mixture(NoisyTopOne(8, gate), FilterBanks(8, 16, activation, 0.001, rngs=rngs))


def single(activation: str, *, rngs: nnx.Rngs) -> FilterBanks:
  """One bank of as many filters as the mixture has in all."""
  return FilterBanks(1, 128, activation, 1.0, rngs=rngs)
