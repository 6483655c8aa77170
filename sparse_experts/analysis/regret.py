"""Measures a router's regret: the change of the loss when a token is forced to each other expert.

The measurement is exact: the whole model runs again for each forced choice. It needs routers whose choice
depends on the token alone, dropless; rows of a batch are then independent, and each row of a forward pass
measures one forced choice.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparse_experts import moe, partitioning
from sparse_experts.analysis.probe import num_rows, on_devices, sparse_layers
from sparse_experts.analysis.trace import Columns, trace
from sparse_experts.errors import UserError, nearest
from sparse_experts.models import Batch, Model, build
from sparse_experts.tasks import Task, task_of
from sparse_experts.training.evaluate import interval
from sparse_experts.training.run import Run


def regret(run: Run, batch: Batch, *, layers: Sequence[str] | None = None,
           positions: Sequence[int] | None = None, rank: int = 0, traced: Columns | None = None,
           say: Callable[[str], None] | None = None) -> Columns:
  """One row per token, sparse layer and expert that the token could go to, as flat arrays.

  layers: names; all sparse ones by default. positions: in a row; all by default.
  rank: which of a token's choices is replaced; experts it uses for the others are no alternatives.
  traced: `trace(run, batch)`, where it is at hand.
  say: gets a line with the cost before the work (see `forward_passes`), then lines of progress.

    step, layer, example, position, token_id, domain, rank    as in `trace`
    chosen, forced  expert by the router and by force; the chosen one has a row, too, with changes of 0
    change          of the nats of all targets of the row, forced minus chosen: below 0 the forced expert
                    is better. Later tokens feel it through attention, and later layers route anew
    own_change      of the nats of the token's own target; NaN where it has none, as in an encoder or an image

  The forced expert's gate is its own probability from the router, scaled as the router scaled the chosen
  one's (`moe.force`): 1 for raw gates.
  """
  task = task_of(run.config)
  if not task.rows_apart:
    raise UserError(f"the loss of {task.items} is of a whole batch, so forcing a token of one row would "
                    "change the others'; regret needs rows with losses of their own, as of text or images")
  sparse_layers(run.abstract_model("dropless"))  # its message is clearer than a refused edit
  model = build(run.config, run.tokenizer.vocab_size, "dropless", router=run.router,
                edit=functools.partial(moe.force, rank=rank))
  layers, places = _check(model, task, batch, layers, positions, rank)
  table = _alternatives(trace(run, batch) if traced is None else traced, model, layers, places, rank)
  cases = np.flatnonzero(table["forced"] != table["chosen"])
  forward = _Forward(run, model, batch, len(cases))
  passes, say = forward.passes, say or (lambda text: None)
  say(f"regret: {len(cases):,} forced choices, {passes:,} forward passes")

  every_row = np.arange(num_rows(batch))
  chosen_BL = np.concatenate([loss_RL for _, loss_RL in forward(every_row, *[0 * every_row - 1] * 3)])
  index = {name: i for i, name in enumerate(model.sparse_layers)}
  layer_N = np.array([index[name] for name in table["layer"]], np.int32)
  table["change"] = np.zeros(len(layer_N))
  table["own_change"] = np.where(np.isnan(table.pop("token_loss")), np.nan, 0.0)
  columns = (table["example"], layer_N, table["position"], table["forced"])
  for done, (at, loss_RL) in enumerate(forward(*[column[cases] for column in columns]), 1):
    case_R = cases[at]
    change_RL = loss_RL - chosen_BL[table["example"][case_R]]
    table["change"][case_R] = change_RL.sum(1)
    own = np.isfinite(table["own_change"][case_R])
    table["own_change"][case_R[own]] = change_RL[own, table["position"][case_R[own]]]
    if done == passes or done % -(-passes // 10) == 0:
      say(f"regret: {done:,} of {passes:,} forward passes")
  return table


def forward_passes(run: Run, batch: Batch, *, layers: Sequence[str] | None = None,
                   positions: Sequence[int] | None = None) -> int:
  """Forward passes, of about `eval.batch_size` rows, that `regret` takes if routers choose k of E."""
  model, task = run.abstract_model("dropless"), task_of(run.config)
  layers, places = _check(model, task, batch, layers, positions, 0)
  forced = sum(int((task.routed(name, batch).segment_BL[:, places[name]] > 0).sum())
               * (model.sparse_layers[name].num_experts - model.sparse_layers[name].k) for name in layers)
  return _Forward(run, model, batch, forced).passes


def token_regret(table: Columns) -> Columns:
  """From `regret`'s rows, one per token and layer: step, layer, example, position, chosen, best, regret.

  regret: nats of the row's loss that the best expert would have saved, at least 0; `best` is that expert, the
  chosen one if no other is better.
  """
  keys = ("step", "layer", "example", "position")
  other = table["forced"] != table["chosen"]
  order = np.lexsort([other, *(table[name] for name in ("change", *keys[::-1]))])
  first = np.ones(len(order), bool)
  first[1:] = np.any([table[name][order][1:] != table[name][order][:-1] for name in keys], axis=0)
  best = order[first]
  return {**{name: table[name][best] for name in (*keys, "chosen")}, "best": table["forced"][best],
          "regret": 0.0 - table["change"][best]}


def by_confidence(tokens: Columns, traced: Columns, of: str = "router", bins: int = 4) -> Columns:
  """The regret of more and of less confident tokens, a row per layer and bin of equally many tokens.

  tokens: of `token_regret`; traced: `trace(run, batch)`, dropless, on the same batch.
  of: `router`, the largest probability of the token's router; `target`, the model's probability of the
    token's own target. Tokens without one are left out: of a router without probabilities, an encoder's, an
    image's.

    layer, tokens         how many the bin holds
    least, most           the confidences of the bin
    regret, low, high     mean of `token_regret`'s, and its 95% interval over records; NaN of one record
    chosen_best           share of tokens for which no other expert was better
  """
  if of not in ("router", "target"):
    raise UserError(f"of='{of}' is no confidence{nearest(of, ('router', 'target'))}")
  at_N = _rows_in(tokens, traced)
  confidence_N = traced["prob_0"][at_N] if of == "router" else np.exp(-traced["token_loss"][at_N])
  confidence_N, rows = confidence_N.astype(np.float64), []
  for layer in dict.fromkeys(tokens["layer"].tolist()):
    here = np.flatnonzero((tokens["layer"] == layer) & np.isfinite(confidence_N))
    here = here[np.argsort(confidence_N[here], kind="stable")]
    for part in filter(len, np.array_split(here, bins)):
      regret_P, (_, which_P) = tokens["regret"][part], np.unique(tokens["example"][part], return_inverse=True)
      ends = interval(list(zip(np.bincount(which_P, regret_P), np.bincount(which_P))))
      rows.append((layer, len(part), *confidence_N[part[[0, -1]]], regret_P.mean(), *(ends or (np.nan,) * 2),
                   (tokens["chosen"] == tokens["best"])[part].mean()))
  names = ("layer", "tokens", "least", "most", "regret", "low", "high", "chosen_best")
  return {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}


def _rows_in(tokens: Columns, traced: Columns) -> np.ndarray:
  """A row of `traced` for each token: any of its entries."""
  both = [np.concatenate([traced[name], tokens[name]]) for name in ("step", "layer", "example", "position")]
  key_N = np.ravel_multi_index([np.unique(x_N, return_inverse=True)[1] for x_N in both],
                               [len(np.unique(x_N)) for x_N in both])
  seen, at = np.unique(key_N[:len(traced["step"])], return_index=True)
  wanted_N = key_N[len(traced["step"]):]
  found_N = np.minimum(np.searchsorted(seen, wanted_N), len(seen) - 1)
  if not (seen[found_N] == wanted_N).all():
    raise ValueError("a token of the regret is not in the trace; trace the same batch, step and layers")
  return at[found_N]


class _Forward:
  """Runs the model with one forced choice per row; gives nats of each target."""

  def __init__(self, run: Run, model: Model, batch: Batch, cases: int):
    self._run, self._batch = run, batch
    shards = run.mesh.shape["data"] * run.mesh.shape["expert"]
    self.rows = -(-max(min(run.config.eval.batch_size, cases), 1) // shards) * shards  # of every pass
    self.passes = -(-cases // self.rows)
    task = task_of(run.config)

    def losses(params, buffers, part, layer_R, position_R, expert_R):
      edits = {}
      for i, name in enumerate(model.sparse_layers):
        place_L = jnp.arange(model.length(name, part))
        here_RL = (layer_R == i)[:, None] & (position_R[:, None] == place_L[None])
        edits[name] = jnp.where(here_RL, expert_R[:, None], -1)
      logits, _ = model.apply(params, buffers, part, edits=edits)
      return task.target_losses(logits, part)

    self._losses = jax.jit(losses, out_shardings=partitioning.replicated(run.mesh))

  def __call__(self, example_N, layer_N, position_N, expert_N) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(which cases, loss_RL float64) of each pass; an expert of -1 forces nothing."""
    cases, rows = len(example_N), self.rows
    for start in range(0, cases, rows):
      at = np.arange(start, start + rows) % cases  # the last pass is filled up with the first cases
      part = on_devices(self._run, {name: a[example_N[at]] for name, a in self._batch.items()})
      force = [np.asarray(a[at], np.int32) for a in (layer_N, position_N, expert_N)]
      with partitioning.use(self._run.mesh):
        loss_RL = np.asarray(self._losses(self._run.params, self._run.buffers, part, *force), np.float64)
      n = min(rows, cases - start)
      yield at[:n], loss_RL[:n]


def _check(model: Model, task: Task, batch: Batch, layers: Sequence[str] | None,
           positions: Sequence[int] | None, rank: int) -> tuple[list[str], dict[str, np.ndarray]]:
  """(layers, positions of each); refuses unknown ones, and routers for which forcing is not exact."""
  known = model.sparse_layers
  for name, layer in known.items():
    if layer.causality != "self":
      raise UserError(
          f"layer {name}: router {type(layer.router).__name__} depends on other tokens (causality"
          f" '{layer.causality}'), so forcing one token would move others; regret needs causality 'self'")
  chosen = list(known) if layers is None else list(layers)
  for name in chosen:
    if name not in known:
      raise UserError(f"layer '{name}' is not sparse{nearest(name, known)}")
    if (heads := known[name].num_heads) > 1:
      raise UserError(f"layer {name}: each token is cut into {heads} sub-tokens with experts of their own "
                      "(model.moe_heads), so there is no one choice of a token to force; regret needs layers "
                      "that route whole tokens")
    if not 0 <= rank < known[name].k:
      raise UserError(f"rank={rank} of layer {name}: its tokens have k={known[name].k} choices; "
                      f"choose from 0 to {known[name].k - 1}")
  length = {name: model.length(name, batch) for name in chosen}
  wanted = np.arange(max(length.values())) if positions is None else np.unique(np.asarray(positions, int))
  if not len(wanted) or wanted[0] < 0 or wanted[-1] >= max(length.values()):
    raise UserError(f"positions={np.asarray(positions).tolist()}: rows have places 0 to "
                    f"{max(length.values()) - 1}; choose among them")
  return chosen, {name: wanted[wanted < length[name]] for name in chosen}


def _alternatives(traced: Columns, model, layers, positions, rank) -> Columns:
  """A row per token, layer and expert, except the token's choices other than number `rank`."""
  keep = ("step", "layer", "example", "position", "token_id", "domain", "rank", "token_loss")
  tables = []
  for name in layers:
    here = (traced["layer"] == name) & np.isin(traced["position"], positions[name])
    length = 1 + int(max(traced["position"][here], default=0))
    place_N = traced["example"][here] * length + traced["position"][here]
    expert_N, rank_N, valid_N = (traced[c][here] for c in ("expert", "rank", "valid"))
    mine = valid_N & (rank_N == rank)
    E = model.sparse_layers[name].num_experts
    used = np.zeros((1 + int(place_N.max(initial=0)), E), bool)
    used[place_N[valid_N & ~mine], expert_N[valid_N & ~mine]] = True
    token, forced = np.nonzero(~used[place_N[mine]])
    row = np.flatnonzero(here)[mine][token]
    tables.append({**{c: traced[c][row] for c in keep}, "chosen": traced["expert"][row],
                   "forced": forced.astype(np.int32)})
  return {c: np.concatenate([table[c] for table in tables]) for c in tables[0]}
