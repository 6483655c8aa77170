"""A sparse layer as two Python loops, in float64, with its backward pass written by hand.

Judges every router, dispatch and mesh. It shares no code with the package: `moe` walks a list of
assignments, `top_k` makes one. Gradients: `moe_gradient` takes the output's cotangent to tokens, gates
and weights; `top_k_gradient` takes gates' and losses' cotangents to the logits.
"""

import math

import numpy as np


def softmax(logit):
  e = np.exp(logit - logit.max())
  return e / e.sum()


# ------------------------------------------------------------------------------------------ experts


def _activation(name):
  if name in ("gelu", "geglu"):
    c = math.sqrt(2 / math.pi)

    def value(a):
      return 0.5 * a * (1 + np.tanh(c * (a + 0.044715 * a**3)))

    def slope(a):
      t = np.tanh(c * (a + 0.044715 * a**3))
      return 0.5 * (1 + t) + 0.5 * a * (1 - t**2) * c * (1 + 3 * 0.044715 * a**2)
  elif name == "swiglu":

    def value(a):
      return a / (1 + np.exp(-a))

    def slope(a):
      s = 1 / (1 + np.exp(-a))
      return s + a * s * (1 - s)
  else:

    def value(a):
      return np.maximum(a, 0)

    def slope(a):
      return (a > 0).astype(float)
  return value, slope


def expert(x, weights, e, activation):
  """One token through one expert; `weights` is a dict w_in, w_out and, if gated, w_gate."""
  value, _ = _activation(activation)
  into = x @ weights["w_in"][e]
  h = value(x @ weights["w_gate"][e]) * into if "w_gate" in weights else value(into)
  return h @ weights["w_out"][e]


def expert_gradient(x, weights, e, activation, dy):
  """(dx, {weight: gradient for expert e})."""
  value, slope = _activation(activation)
  into = x @ weights["w_in"][e]
  dh = weights["w_out"][e] @ dy
  grads = {}
  if "w_gate" in weights:
    gate = x @ weights["w_gate"][e]
    d_gate, d_into = dh * into * slope(gate), dh * value(gate)
    h = value(gate) * into
    grads["w_gate"] = np.outer(x, d_gate)
    dx = weights["w_in"][e] @ d_into + weights["w_gate"][e] @ d_gate
  else:
    h, d_into = value(into), dh * slope(into)
    dx = weights["w_in"][e] @ d_into
  grads["w_in"], grads["w_out"] = np.outer(x, d_into), np.outer(h, dy)
  return dx, grads


class Ternary:
  """One token through one BitLinear expert, and back: the quantizers' gradient is the identity.

  A product is norm, rows rounded to 127 steps of their largest magnitude, times a matrix of -a, 0 and a. Used
  as the `expert` of `moe` and of `moe_gradient`. nearest: how near a number came to where rounding turns.
  """

  def __init__(self, norm):
    self.norm, self.nearest = norm, 1.0

  def __call__(self, x, weights, e, activation):
    return self._pass(x, weights, e, activation)[-1]

  def gradient(self, x, weights, e, activation, dy):
    value, slope = _activation(activation)
    q, into, gate, h, q_h, _ = self._pass(x, weights, e, activation)
    dh = self._norm_gradient(h, self._matrix(weights["w_out"][e]) @ dy)
    grads = {"w_out": np.outer(q_h, dy)}
    if gate is None:
      d_into, dq = dh * slope(into), 0.0
    else:
      d_gate, d_into = dh * into * slope(gate), dh * value(gate)
      grads["w_gate"], dq = np.outer(q, d_gate), self._matrix(weights["w_gate"][e]) @ d_gate
    grads["w_in"] = np.outer(q, d_into)
    return self._norm_gradient(x, dq + self._matrix(weights["w_in"][e]) @ d_into), grads

  def _pass(self, x, weights, e, activation):
    value, _ = _activation(activation)
    q = self._rows(x)
    into, gate = q @ self._matrix(weights["w_in"][e]), None
    if "w_gate" in weights:
      gate = q @ self._matrix(weights["w_gate"][e])
    h = value(into) if gate is None else value(gate) * into
    q_h = self._rows(h)
    return q, into, gate, h, q_h, q_h @ self._matrix(weights["w_out"][e])

  def _matrix(self, w):
    a = max(np.abs(w).mean(), 1e-5)
    return np.clip(self._round(w / a), -1, 1) * a

  def _round(self, x):
    self.nearest = min(self.nearest, np.abs(x - np.floor(x) - 0.5).min())
    return np.round(x)

  def _center(self, x):
    return x - x.mean() if self.norm == "layer" else x

  def _rows(self, x):
    c = self._center(x)
    if self.norm != "none":
      c = c / math.sqrt((c * c).mean() + 1e-6)
    step = max(np.abs(c).max(), 1e-5) / 127
    return np.clip(self._round(c / step), -128, 127) * step

  def _norm_gradient(self, x, dn):
    if self.norm == "none":
      return dn
    c = self._center(x)
    r = math.sqrt((c * c).mean() + 1e-6)
    return self._center(dn / r - c * (c @ dn) / (len(c) * r**3))


# ------------------------------------------------------------------------------------- assignments


def keep(assignments, capacity):
  """Which of a group's (token, expert, gate, valid) get a slot, first come first served."""
  used, kept = {}, []
  for _, e, _, valid in assignments:
    ok = bool(valid) and (capacity is None or used.get(e, 0) < capacity)
    kept.append(ok)
    if ok:
      used[e] = used.get(e, 0) + 1
  return kept


def moe(x_GTD, lists, weights, activation, capacity, expert=expert):
  """y_GTD and kept per group, from each group's list of (token, expert, gate, valid)."""
  y = np.zeros_like(x_GTD)
  all_kept = []
  for g, assignments in enumerate(lists):
    kept = keep(assignments, capacity)
    for (t, e, gate, _), ok in zip(assignments, kept, strict=True):
      if ok:
        y[g, t] += gate * expert(x_GTD[g, t], weights, e, activation)
    all_kept.append(kept)
  return y, np.array(all_kept)


def moe_gradient(x_GTD, lists, weights, activation, capacity, dy_GTD, expert=expert):
  """(dx, dgate per group and assignment, dweights)."""
  dx = np.zeros_like(x_GTD)
  dweights = {name: np.zeros_like(w) for name, w in weights.items()}
  dgate = np.zeros((len(lists), len(lists[0])))
  gradient = getattr(expert, "gradient", expert_gradient)
  for g, assignments in enumerate(lists):
    for a, ((t, e, gate, _), ok) in enumerate(zip(assignments, keep(assignments, capacity), strict=True)):
      if not ok:
        continue
      dgate[g, a] = dy_GTD[g, t] @ expert(x_GTD[g, t], weights, e, activation)
      dx_token, grads = gradient(x_GTD[g, t], weights, e, activation, gate * dy_GTD[g, t])
      dx[g, t] += dx_token
      for name, value in grads.items():
        dweights[name][e] += value
  return dx, dgate, dweights


def sub_tokens(x_GTD, mask_GT, h, w, b):
  """(sub-tokens [G, T h, D / h], their mask): each token's vector, times w plus b if given, in h parts."""
  parts = []
  for g in range(len(x_GTD)):
    of_group = []
    for t in range(x_GTD.shape[1]):
      u = (x_GTD[g, t] if w is None else x_GTD[g, t] @ w + b) * mask_GT[g, t]
      of_group += [(part, mask_GT[g, t]) for part in np.split(u, h)]
    parts.append(of_group)
  return (np.array([[part for part, _ in of] for of in parts]),
          np.array([[real for _, real in of] for of in parts]))


# ------------------------------------------------------------------------------------------- top-k


def choices(p, k):
  """Experts by falling probability, ties to the lower index."""
  return sorted(range(len(p)), key=lambda e: (-p[e], e))[:k]


def top_k(logit_GTE, mask_GT, k, gate, order, capacity):
  """Each group's list of (token, expert, gate, valid) in the order of claims."""
  lists = []
  for logit_TE, mask_T in zip(logit_GTE, mask_GT, strict=True):
    prob = [softmax(row) for row in logit_TE]
    chosen = [choices(p, k) for p in prob]
    tokens = list(range(len(prob)))
    if order == "batch_priority":
      tokens.sort(key=lambda t: -prob[t].max() if mask_T[t] else math.inf)
    if order == "token":
      walk = [(t, j) for t in tokens for j in range(k)]
    else:
      walk = [(t, j) for j in range(k) for t in tokens]
    raw = [(t, chosen[t][j], prob[t][chosen[t][j]], mask_T[t]) for t, j in walk]
    divisor = _divisors(raw, gate, capacity)
    lists.append([(t, e, value / divisor.get(t, 1.0), valid) for t, e, value, valid in raw])
  return lists


def _divisors(raw, gate, capacity):
  counted = keep(raw, capacity) if gate == "renormalized_after_drops" else [True] * len(raw)
  divisor = {}
  if gate != "raw":
    for (t, _, value, _), ok in zip(raw, counted, strict=True):
      if ok:
        divisor[t] = divisor.get(t, 0.0) + value
  return divisor


def top_k_losses(logit_GTE, mask_GT, k, balance_count):
  """{name: (sum over groups with real tokens, number of them)}."""
  balance, z, groups = 0.0, 0.0, 0
  for logit_TE, mask_T in zip(logit_GTE, mask_GT, strict=True):
    real = [t for t in range(len(mask_T)) if mask_T[t]]
    if not real:
      continue
    E = logit_TE.shape[1]
    groups += 1
    share, mean = _shares(logit_TE, real, k, balance_count)
    balance += E * sum(share[e] * mean[e] for e in range(E))
    z += sum(math.log(np.exp(logit_TE[t]).sum()) ** 2 for t in real) / len(real)
  return {"load_balance": (balance, groups), "z": (z, groups)}


def _shares(logit_TE, real, k, balance_count):
  count, mean = np.zeros(logit_TE.shape[1]), np.zeros(logit_TE.shape[1])
  for t in real:
    p = softmax(logit_TE[t])
    mean += p / len(real)
    for e in choices(p, 1 if balance_count == "first" else k):
      count[e] += 1 / len(real)
  return count / (k if balance_count == "assignments" else 1), mean


def top_k_gradient(logit_GTE, mask_GT, k, gate, order, capacity, balance_count, dgate_GA, d_balance, d_z):
  """Cotangents of gates (in list order) and of the two losses' sums -> cotangent of the logits."""
  dlogit = np.zeros_like(logit_GTE)
  raws = top_k(logit_GTE, mask_GT, k, "raw", order, capacity)
  for g, raw in enumerate(raws):
    dprob = np.zeros_like(logit_GTE[g])
    divisor = _divisors(raw, gate, capacity)
    counted = keep(raw, capacity) if gate == "renormalized_after_drops" else [True] * len(raw)
    for a, (t, e, value, _) in enumerate(raw):
      if gate == "raw":
        dprob[t, e] += dgate_GA[g, a]
        continue
      total = divisor.get(t)
      if total is None:
        continue
      dprob[t, e] += dgate_GA[g, a] / total
      for b, (s, other, _, _) in enumerate(raw):  # the divisor's share
        if s == t and counted[b]:
          dprob[t, other] -= dgate_GA[g, a] * value / total**2
    real = [t for t in range(mask_GT.shape[1]) if mask_GT[g, t]]
    if real:
      share, _ = _shares(logit_GTE[g], real, k, balance_count)
      for t in real:
        dprob[t] += d_balance * len(share) * share / len(real)
    for t in range(mask_GT.shape[1]):
      p = softmax(logit_GTE[g, t])
      dlogit[g, t] = p * (dprob[t] - (p * dprob[t]).sum())
      if t in real:
        dlogit[g, t] += d_z * 2 * math.log(np.exp(logit_GTE[g, t]).sum()) * p / len(real)
  return dlogit
