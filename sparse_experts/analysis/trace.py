"""Routing decisions of each token as flat arrays: `pandas.DataFrame(trace(run, probe(run)))`."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_experts import partitioning
from sparse_experts.analysis.probe import num_rows, parts, sparse_layers
from sparse_experts.models import Batch, SparseLayer
from sparse_experts.moe import Routing
from sparse_experts.tasks import task_of
from sparse_experts.tasks.task import Routed
from sparse_experts.training.run import Run

TOP = 8  # probabilities kept of each token

Columns = dict[str, np.ndarray]


def trace(runs: Run | Iterable[Run], batch: Batch, kind: str = "dropless",
          layers: Sequence[str] | None = None) -> Columns:
  """One row per entry of the routers' lists, without padding, in arrays of one dimension and equal length.

  runs: a `Run`, or an iterable of several steps of one run, traced one after another.
  kind: `dropless`, `eval_capacity`, or `train` for the capacity of training; always without noise.
  layers: names; all sparse ones by default.

    step          of the run
    layer         "decoder/01"
    example       row of `batch`; of a probe, the record's number in the frozen validation list
    position      position in the row; encoder layers count positions of the encoder's row
    head          which of the token's sub-tokens, where `model.moe_heads` cuts tokens; 0 elsewhere
    token_id      the input at that position; -1 for an image's token
    domain        of the record; of images the class, of pairs the modality: 0 image, 1 text
    rank          which of its (sub-)token's entries, from 0 in the router's order: its first choice, ...
    expert, gate  the expert and the weight of its output; a dropped assignment keeps its gate
    valid         True for an assignment, False for a choice that the router skipped: leave it out of counts
    kept          the assignment got a slot; dropped is valid and not kept
    entropy       of the token's probabilities over all experts, in nats
    token_loss    nats of the target at that position; NaN without a target, as in an encoder or an image
    prob_0..7     the token's largest probabilities, descending; NaN beyond the number of experts
    prob_expert_0..7  their experts; -1 beyond

  Rows are sorted by step, layer, example, position, head and rank. A router without probabilities has NaN
  and -1. Entropy and probabilities are of the sub-token, where there are several.
  """
  steps = iter([runs] if isinstance(runs, Run) else runs)
  first, tables = next(steps), []
  model, task = first.abstract_model(kind), task_of(first.config)
  chosen = sparse_layers(model, layers)
  look = jax.jit(lambda *arrays: _look(model, task.token_targets, chosen, *arrays),
                 out_shardings=partitioning.replicated(first.mesh))
  for run in itertools.chain([first], steps):
    for start, part in parts(run, model, batch):
      with partitioning.use(run.mesh):
        loss_BL, lists = jax.device_get(look(run.params, run.buffers, part))
      computed = num_rows(part)
      rows = {name: a[start:start + computed] for name, a in batch.items()}
      tables += [_table(run.step, name, chosen[name], arrays, loss_BL, task.routed(name, rows), computed,
                        start) for name, arrays in lists.items()]
  columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
  order = np.lexsort([columns[n] for n in ("rank", "head", "position", "example", "layer", "step")])
  return {name: a[order] for name, a in columns.items()}


def token_loss(logits_BLV: jax.Array, batch: Batch) -> jax.Array:
  """Nats of each target, NaN where nothing is predicted."""
  loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV.astype(jnp.float32), batch["targets"])
  return jnp.where(batch["weights"] > 0, loss_BL, jnp.nan)


def _look(model, token_targets, layers, params, buffers, batch):
  logits, routings = model.apply(params, buffers, batch, trace=True)
  return token_loss(logits, batch) if token_targets else None, {
      layer: _list(routing) for layer, routing in routings.items() if layer in layers}


def _list(routing: Routing) -> dict[str, Any]:
  """The arrays of a table, each _GA; probabilities are those of the assignment's token."""
  arrays: dict[str, Any] = dict(
      token=routing.token, expert=routing.expert, gate=routing.gate, valid=routing.valid, kept=routing.kept,
      rank=routing.ranks())
  if routing.prob is None or routing.token is None:
    return arrays
  prob_GTk, expert_GTk = jax.lax.top_k(routing.prob, min(TOP, routing.prob.shape[-1]))
  entropy_GT1 = -jax.scipy.special.xlogy(routing.prob, routing.prob).sum(-1, keepdims=True)
  token_GA1 = routing.token[..., None]
  of_token = lambda a_GTk: jnp.take_along_axis(a_GTk, token_GA1, axis=1)
  return arrays | dict(prob=of_token(prob_GTk), prob_expert=of_token(expert_GTk),
                      entropy=of_token(entropy_GT1)[..., 0])


def _table(step: int, name: str, layer: SparseLayer, arrays: dict[str, np.ndarray],
           loss_BL: np.ndarray | None, rows: Routed, computed: int, start: int) -> Columns:
  """Columns of one layer for the rows of a part, without padding; `arrays` holds _GA arrays.

  computed: rows of the part, of which the last may fill it up.
  """
  id_BL, segment_BL, domain_BL = rows
  length = id_BL.shape[1]
  T = layer.group_length(computed * length) * layer.num_heads
  sub_GA = np.arange(len(arrays["token"]))[:, None] * T + arrays["token"]
  flat_GA, head_GA = np.divmod(sub_GA, layer.num_heads)
  b_GA, l_GA = np.divmod(flat_GA, length)
  real_GA = b_GA < len(id_BL)  # later rows fill up the part or its last group
  real_GA[real_GA] = segment_BL[b_GA[real_GA], l_GA[real_GA]] > 0
  b_N, l_N = b_GA[real_GA], l_GA[real_GA]
  N = len(b_N)
  nothing = np.full((N, TOP), np.nan, np.float32)
  prob_NP, expert_NP, entropy_N = nothing, np.full((N, TOP), -1, np.int32), nothing[:, 0]
  if "prob" in arrays:
    k = arrays["prob"].shape[-1]
    prob_NP[:, :k], expert_NP[:, :k] = arrays["prob"][real_GA], arrays["prob_expert"][real_GA]
    entropy_N = arrays["entropy"][real_GA]
  integer = lambda a: np.asarray(a, np.int32)
  return {
      "step": np.full(N, step, np.int32), "layer": np.full(N, name), "example": integer(start + b_N),
      "position": integer(l_N), "head": integer(head_GA[real_GA]), "token_id": integer(id_BL[b_N, l_N]),
      "domain": integer(domain_BL[b_N, l_N]),
      **{column: arrays[column][real_GA] for column in ("rank", "expert", "gate", "valid", "kept")},
      "entropy": entropy_N,
      "token_loss": (np.full(N, np.nan, np.float32) if loss_BL is None or name.startswith("encoder") else
                     loss_BL[b_N, l_N]),
      **{f"prob_{i}": prob_NP[:, i] for i in range(TOP)},
      **{f"prob_expert_{i}": expert_NP[:, i] for i in range(TOP)}}
