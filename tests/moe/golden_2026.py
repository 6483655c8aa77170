"""Eight tokens and four experts, on which the originals' code was run, or two own scripts, in float64."""

import jax.numpy as jnp
import numpy as np

LOGIT_GTE = jnp.array([[
    [2.0, 0.5, -1.0, 0.1], [1.6, 1.1, 0.2, -0.7], [0.3, 1.9, -0.4, 0.8], [1.2, -0.6, 0.9, -1.5],
    [2.4, 0.7, 1.3, 0.4], [-0.2, 0.6, 1.7, 1.0], [1.4, 1.5, -0.9, -0.3], [0.9, -1.2, 0.05, 2.2]]])
MASK_GT = jnp.ones((1, 8), bool)
PRINTED = 2e-6  # golden values have six digits
TOP_2 = ["01", "01", "13", "02", "02", "23", "01", "03"]


def taken(routing, E=4):
  """(gate_TE, 0 where a token does not go; whether it goes, bool _TE) of one group."""
  gate_TE, goes_TE = np.zeros((routing.prob.shape[1], E)), np.zeros((routing.prob.shape[1], E), bool)
  token, expert, gate, valid = (np.asarray(a)[0] for a in (
      routing.token, routing.expert, routing.gate, routing.valid))
  gate_TE[token[valid], expert[valid]], goes_TE[token[valid], expert[valid]] = gate[valid], True
  return gate_TE, goes_TE


def sets(routing):
  """The experts of each token, as digits."""
  return ["".join(str(e) for e in np.flatnonzero(goes_E)) for goes_E in taken(routing)[1]]


def matrix(scale, offset, axes=(2, 1)):
  """.5 ((e + scale)(i a + j b + offset) mod 7 - 3) for experts e, rows i of 2, columns j of 4, _EFD."""
  e, i, j = np.ogrid[:5, :2, :4]
  return 0.5 * ((e + scale) * (axes[0] * i + axes[1] * j + offset) % 7 - 3)


GATE_EFD, UP_EFD, DOWN_EFD = matrix(1, 1), matrix(2, 1, (1, 2)), matrix(1, 2, (3, 1))


def swiglu(x_TD):
  """Outputs of the four experts and, last, of the shared one, _ETD in float64."""
  gate, up = (np.einsum("td,efd->etf", x_TD, w_EFD) for w_EFD in (GATE_EFD, UP_EFD))
  return np.einsum("etf,efd->etd", gate / (1 + np.exp(-gate)) * up, DOWN_EFD)
