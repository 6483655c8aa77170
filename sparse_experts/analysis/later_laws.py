"""Later scaling laws of sparse models: finer experts, and sparsity, with tokens of training as a variable.

Each law is a form with its numbers; `FINE_GRAINED` and `SPARSITY` are those that were published. Losses are
natural, in nats per token. The published numbers were read in two secondary sources that agree.
"""

import dataclasses
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize


@dataclasses.dataclass(frozen=True)
class FineGrainedLaw:
  """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024).

  N: parameters without embeddings. D: tokens of training. G: granularity, how many times narrower an expert
  is than the FFN.
  """

  a: float
  alpha: float
  b: float
  beta: float
  g: float
  gamma: float
  c: float

  def loss(self, params: ArrayLike, tokens: ArrayLike, granularity: ArrayLike) -> np.ndarray:
    N, D, G = (np.asarray(x, np.float64) for x in (params, tokens, granularity))
    return self.c + (self.g / G**self.gamma + self.a) / N**self.alpha + self.b / D**self.beta


@dataclasses.dataclass(frozen=True)
class SparsityLaw:
  """L = a / N^alpha + b / D^beta + c / (1-S)^lambda + d / ((1-S)^delta N^gamma) + e (Abnar et al. 2025).

  N: all parameters. D: tokens of training. S: sparsity, the share of parameters that a token does not use.
  """

  a: float
  alpha: float
  b: float
  beta: float
  c: float
  lambda_: float
  d: float
  delta: float
  gamma: float
  e: float

  def loss(self, params: ArrayLike, tokens: ArrayLike, sparsity: ArrayLike) -> np.ndarray:
    N, D, used = np.asarray(params, np.float64), np.asarray(tokens, np.float64), 1 - np.asarray(sparsity)
    return (self.a / N**self.alpha + self.b / D**self.beta + self.c / used**self.lambda_
            + self.d / (used**self.delta * N**self.gamma) + self.e)


# Fitted to models of 129M to 3.7G parameters, 16G to 130G tokens and G from 1 to 16, with 64 times the
# parameters of one FFN in each sparse layer.
FINE_GRAINED = FineGrainedLaw(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47)
SPARSITY = SparsityLaw(a=16612.50, alpha=0.5962, b=5455.67, beta=0.3954, c=0.4598, lambda_=-0.1666, d=17.26,
                       delta=0.1603, gamma=0.1595, e=0.94)

_Law = TypeVar("_Law", FineGrainedLaw, SparsityLaw)


def refit(law: _Law, losses: ArrayLike, **variables: ArrayLike) -> _Law:
  """A law of the same form with the least sum of squared errors of log L; the search begins at `law`.

  variables: the arguments of `law.loss`, an entry for each loss. Numbers keep the signs that they have.
  Raises ValueError where there are no more losses than numbers.
  """
  y, start = np.log(np.asarray(losses, np.float64)), np.array(dataclasses.astuple(law))
  if len(y) <= len(start):
    raise ValueError(f"{len(y)} losses cannot fix the law's {len(start)} numbers; give more")
  make = lambda x: type(law)(*(start * np.exp(x)))
  error = lambda x: np.log(make(x).loss(**variables)) - y
  found = optimize.least_squares(error, np.zeros(len(start)), x_scale="jac", bounds=(-3, 3))
  return make(found.x)
