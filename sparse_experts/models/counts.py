"""Parameters and FLOPs of a config, from shapes alone: nothing is allocated.

Model FLOPs count what the mathematics needs, forward, 2 per multiply-add: the rows routed to experts
(k per token), the router, shared experts, dense FFNs, attention and the head. They do not count padding,
empty slots or one-hot dispatch, and of a causal mask only the visible half. Embedding look-ups, norms and
activations are left out. Where tokens differ in their number of experts, all figures count the most that a
token can have, and the layer's entry has `at_most`.

Executed FLOPs count the products that the training program makes for it: every slot of `einsum` and
`scatter`, the one-hot products of `einsum`, and attention to the masked half. `ragged` computes the rows
of the list; the rows that fill up blocks of its CPU backend, at most one block per expert and call, are not
counted.
"""

import math
from typing import Any

import jax

from sparse_experts.config import ConfigDict
from sparse_experts.models.build import build
from sparse_experts.models.model import Model
from sparse_experts.models.stack import Stack
from sparse_experts.models.template import Params
from sparse_experts.partitioning import is_axes


def describe(config: ConfigDict, vocab_size: int, target_length: int | None = None) -> dict[str, Any]:
  """params_total, params_active (those a token can meet), flops_per_token, `flops` by part, and `layers`.

  Also executed_flops_per_token and `executed_flops`. FLOPs are per token of rows of
  `config.data.length` tokens; in an encoder-decoder the average over its encoder's and its decoder's, of
  which there are `target_length` (or `config.data.target_length`, or as many as the encoder's). In `layers`
  they are per token of the layer's own stack. In a `vit` they are per token of an image, those of its head
  and of its patches' `embedding` spread over them; in a `limoe` per token of an image and its text, likewise,
  without the comparison of a batch's pairs.
  """
  model = build(config, vocab_size, "train")
  params, _ = jax.eval_shape(model.init, jax.random.key(0))
  return describe_model(model, params, config.data.length, target_length or config.data.target_length)


def describe_model(model: Model, params: Params, row_length: int,
                   target_length: int | None) -> dict[str, Any]:
  """The figures of `describe`, of a model for training and its parameters, arrays or shapes."""
  length = model.lengths(row_length, target_length)
  tokens = sum(length.values())

  layers = []
  flops = dict.fromkeys(("ffn", "router", "attention", "head"), 0.0)
  executed = dict.fromkeys(("ffn", "router", "dispatch", "attention", "head"), 0.0)
  for name, stack in model.stacks.items():
    own, other = length[name], length.get("encoder", 0) if name == "decoder" else 0
    for layer in range(len(stack.kinds)):
      entry, *counted = _layer(
          stack, params[name]["blocks"], layer, model.visible(name, own), own, other, other / own)
      layers.append(entry)
      for sums, parts in zip((flops, executed), counted, strict=True):
        for part, count in parts.items():
          sums[part] += count * own / tokens
  for part, count in model.row_flops(params, length).items():
    flops[part] = executed[part] = count / tokens

  total = sum(math.prod(a.shape) for a in jax.tree.leaves(params))
  idle = sum(entry["params"] - entry["params_active"] for entry in layers)
  return {"params_total": total, "params_active": total - idle, "flops_per_token": sum(flops.values()),
          "flops": flops, "executed_flops_per_token": sum(executed.values()), "executed_flops": executed,
          "layers": layers}


def _layer(stack: Stack, blocks: Params, layer: int, visible: float, keys: int, cross_keys: int,
           cross_rows: float) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
  """(the layer's line of the table, model and executed FLOPs by part) per token of its stack.

  visible: positions a query sees, of `keys` that are computed; cross_keys: of the encoder, all seen.
  cross_rows: encoder tokens per decoder token.
  """
  s, _, i = stack.where(layer)
  block, kind = stack.block(layer), stack.kinds[layer]
  sizes = {"projection": 0, "ffn": 0, "shared": 0, "router": 0, "attention": 0, "cross_rows": 0, "other": 0}
  size = active = 0
  axes = jax.tree.leaves(stack.axes[str(s)][str(i)], is_leaf=is_axes)
  arrays = jax.tree_util.tree_leaves_with_path(blocks[str(s)][str(i)])
  parts = block.sparse_parts
  for (keys_of, array), names in zip(arrays, axes, strict=True):
    n, path = math.prod(array.shape[1:]), [p.key for p in keys_of]  # without layers
    part = _part(path, array.ndim - 1 - ("expert" in names))
    met = used = n
    if path[0] in parts and part in ("ffn", "projection", "router"):
      used *= parts[path[0]].num_heads  # once for each sub-token
    if "expert" in names:
      sparse = parts[path[0]]
      met = n * min(sparse.most_experts * sparse.num_heads, sparse.num_experts) // sparse.num_experts
      used = used * sparse.most_experts // sparse.num_experts
    size, active = size + n, active + met
    sizes[part] += used
  sizes["router"] += sum(part.num_heads * part.router.fixed_weights
                         for part in parts.values() if part.router is not None)
  attention = (block.block if kind.depth else block).attention
  per_key = attention.flops_per_key
  projections = 2 * (sizes["projection"] + sizes["attention"] + cross_rows * sizes["cross_rows"])
  flops = {"ffn": 2 * (sizes["ffn"] + sizes["shared"]), "router": 2 * sizes["router"],
           "attention": projections + per_key * (visible + cross_keys)}
  executed = flops | {"attention": projections + per_key * (keys + cross_keys)}
  entry = {"name": stack.layer_name(layer), "kind": "sparse" if parts else "dense", "hidden": kind.hidden}
  if kind.depth:
    share = block.chosen(keys) / keys  # of the tokens, and of those that each of them sees
    flops = {"ffn": share * flops["ffn"], "router": 2 * block.w.shape[0],
             "attention": share * (projections + per_key * share * keys)}
    executed, entry = dict(flops), entry | {"kind": "depth"}
  d = attention.out.shape[-1]
  for part, sparse in parts.items():
    entry |= {"experts": sparse.num_experts, "k": sparse.k, "dispatch": sparse.dispatch}
    if sparse.num_heads > 1:
      entry["heads"] = sparse.num_heads
    extra = sparse.rows_per_token(keys) / sparse.most_experts - 1  # what is computed for a row that is routed
    if sparse.router is None:
      flops["ffn"] += extra * 2 * sizes["ffn"]
      flops["router"] = sparse.router_flops(d, keys)
      executed |= {name: flops[name] for name in ("ffn", "router")}
      continue
    if sparse.router.most_experts is not None:
      entry["at_most"] = True
    executed[part] += extra * 2 * sizes["ffn" if part == "ffn" else "projection"]
    width = d + (d if part == "ffn" else 3 * attention.num_heads * attention.head_dim)  # there and back
    executed["dispatch"] = executed.get("dispatch", 0) + sparse.one_hot_flops(keys, width)
  return entry | {"params": size, "params_active": active, "flops_per_token": sum(flops.values()),
                  "executed_flops_per_token": sum(executed.values())}, flops, executed


def _part(path: list[str], ndim: int) -> str:
  """Which product a weight takes part in; cross-attention's keys and values see the encoder's rows."""
  if ndim < 2 or path == ["w"] or "position_bias" in path or path[-1].endswith(("scale", "_norm", "_bias")):
    return "other"
  path = path[path[0] == "block":]  # a Mixture-of-Depths block is around another
  if path[0] == "ffn" and path[1] in ("w_in", "w_gate", "w_out", "experts"):  # dense, and one expert
    return "ffn"
  if path[0] == "extra":
    return "shared"
  if path[0] == "ffn":
    return "shared" if path[1] in ("shared", "whole", "heads") else "router"  # what works on whole tokens
  if path[:2] == ["attention", "projection"]:
    return "router" if path[2] == "router" else "projection"
  return "cross_rows" if path[0] == "cross" and path[1] in ("key", "value") else "attention"
