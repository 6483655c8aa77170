"""Whether experts specialise: how mixed the clusters are that each expert sees."""

import numpy as np


def dispatch_entropy(cluster_N, expert_N) -> float:
  """Σ_e (share of examples sent to e) · (entropy in nats of their clusters).

  0: each expert sees one cluster only. ln 4 = 1.386: each sees all four alike. An expert that sees nothing
  adds 0.
  """
  count_SE = np.zeros((np.max(cluster_N) + 1, np.max(expert_N) + 1))
  np.add.at(count_SE, (np.asarray(cluster_N), np.asarray(expert_N)), 1)
  share_SE = count_SE / np.maximum(count_SE.sum(0), 1)
  entropy_E = -(share_SE * np.log(np.where(share_SE > 0, share_SE, 1))).sum(0)
  return float((count_SE.sum(0) / count_SE.sum() * entropy_E).sum())
