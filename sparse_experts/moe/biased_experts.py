"""Experts with biases: the MLP of a Vision Transformer, E times."""

from flax import nnx

from sparse_experts.moe.experts import Experts


class BiasedExperts(Experts):
  """y = act(x w_in + b_in) w_out + b_out per expert (Riquelme et al. 2021, V-MoE).

  Weights: uniform, variance init_scale / mean of fan-in and fan-out per expert, as ViT's MLP for 1; biases 0.
  Experts start different from each other; in V-MoE's released code they start equal.
  """

  INIT = ("fan_avg", "uniform")

  def __init__(self, num_experts: int, d: int, f: int, activation: str = "gelu", *, dropout: float = 0.0,
               init_scale: float = 1.0, backend: str | None = None, rngs: nnx.Rngs):
    super().__init__(num_experts, d, f, activation, dropout=dropout, init_scale=init_scale, bias=True,
                     backend=backend, rngs=rngs)
