"""MaxText's routed MoE layer with our weights; read by `serve.py` and `compile_layer.py`.

For a TPU it has MaxText's default, the kernel `megablox`, and for a CPU the other two ways that drop no
token: `ragged_dot`, jax's grouped product of sorted rows, and `dense`, all experts for all tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import PartitionSpec as P
from maxtext.configs import pyconfig
from maxtext.layers import initializers, moe
from maxtext.utils import maxtext_utils

PACKAGES = ("maxtext", "jax", "flax", "numpy")
VARIANTS = {"ragged_dot": dict(sparse_matmul=True, megablox=False), "dense": dict(sparse_matmul=False)}


def configure(shapes: dict[str, Any], **more: Any) -> Any:
  """MaxText's config of the layer."""
  settings = {
      "run_name": "peer", "skip_jax_distributed_system": True, "enable_checkpointing": False,
      "decoder_block": "mixtral", "jax_cache_dir": "",
      "base_emb_dim": shapes["embed_dim"], "base_mlp_dim": shapes["expert_dim"],
      "base_moe_mlp_dim": shapes["expert_dim"], "num_experts": shapes["num_experts"],
      "num_experts_per_tok": shapes["k"], "mlp_activations": ["silu", "linear"], "capacity_factor": -1.0,
      "max_target_length": shapes["length"], "weight_dtype": "float32", "dtype": shapes["dtype"],
      "load_balance_loss_weight": 0.0, "float32_gate_logits": True, "attention": "dot_product"} | more
  return pyconfig.initialize([""], **settings)


def routed(config: Any, mesh: jax.sharding.Mesh) -> Any:
  return moe.RoutedMoE(
      config, config.num_experts, config.num_experts_per_tok, mesh,
      initializers.nd_dense_init(1.0, "fan_in", "truncated_normal"), ("embed", None), nnx.Rngs(params=0),
      config.moe_mlp_dim, config.weight_dtype, config.dtype)


def make(shapes: dict[str, Any], arrays: dict[str, np.ndarray], variant: str) -> tuple:
  """For `serve.py`."""
  rows = shapes["tokens"] // shapes["length"]
  config = configure(shapes, per_device_batch_size=rows, hardware="cpu", **VARIANTS[variant])
  mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
  with jax.set_mesh(mesh), linen.logical_axis_rules(config.logical_axis_rules):
    graphdef, *(params, rest) = nnx.split(routed(config, mesh), nnx.Param, ...)
    names = {("gate", "kernel"): "router_DE", ("wi_0",): "gate_EDF", ("wi_1",): "in_EDF",
             ("wo",): "out_EFD"}
    paths = dict(params.flat_state())
    if set(paths) != set(names):
      raise ValueError(f"MaxText's layer has the parameters {sorted(paths)}")
    for path, name in names.items():
      paths[path].set_value(jnp.asarray(arrays[name]))
    x_BLD = jnp.asarray(arrays["x_TD"]).reshape(rows, shapes["length"], -1)
    dy_BLD = jnp.asarray(arrays["dy_TD"]).reshape(x_BLD.shape)

    def gradients(params, x_BLD, dy_BLD):
      y_BLD, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params, rest)(x)[0], params, x_BLD)
      return y_BLD, pull(dy_BLD)

    step = jax.jit(gradients).lower(params, x_BLD, dy_BLD).compile()

  def experts(weights, x_ECD):
    gate_EDF, in_EDF, out_EFD = weights
    product = lambda x, w: jnp.einsum("ecd,edf->ecf", x, w)
    return product(jax.nn.silu(product(x_ECD, gate_EDF)) * product(x_ECD, in_EDF), out_EFD)

  def floor_gradients(weights, x_ECD, dy_ECD):
    y_ECD, pull = jax.vjp(experts, weights, x_ECD)
    return y_ECD, pull(dy_ECD)

  weights = [jnp.asarray(arrays[name]) for name in ("gate_EDF", "in_EDF", "out_EFD")]
  x_ECD = jnp.asarray(np.resize(arrays["x_TD"], (
      shapes["num_experts"], shapes["tokens"] * shapes["k"] // shapes["num_experts"], shapes["embed_dim"])))
  floor = jax.jit(floor_gradients).lower(weights, x_ECD, x_ECD).compile()

  def results():
    y_BLD, (_, dx_BLD) = step(params, x_BLD, dy_BLD)
    return (np.asarray(a).reshape(shapes["tokens"], -1) for a in (y_BLD, dx_BLD))

  return (lambda: jax.block_until_ready(step(params, x_BLD, dy_BLD)),
          lambda: jax.block_until_ready(floor(weights, x_ECD, x_ECD)), results, 0.0)


def lower(shapes: dict[str, Any], devices: list[Any]) -> jax.stages.Lowered:
  """Forward and backward on a mesh of data and expert, with MaxText's own settings."""
  rows = shapes["tokens"] // shapes["length"]
  config = configure(
      shapes, per_device_batch_size=rows / len(devices), compile_topology=shapes["topology"],
      compile_topology_num_slices=1, internal_compile=True, internal_compile_num_devices=len(devices),
      ici_fsdp_parallelism=1, ici_data_parallelism=-1, ici_expert_parallelism=shapes["expert"],
      allow_split_physical_axes=True)
  mesh = jax.sharding.Mesh(
      maxtext_utils.create_device_mesh(config, devices), config.mesh_axes,
      axis_types=(jax.sharding.AxisType.Auto,) * len(config.mesh_axes))
  with jax.set_mesh(mesh), linen.logical_axis_rules(config.logical_axis_rules):
    graphdef, *(params, rest) = nnx.split(nnx.eval_shape(lambda: routed(config, mesh)), nnx.Param, ...)
    put = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    params = jax.tree.map(put, params, nnx.get_named_sharding(params, mesh))
    x_BLD = put(jax.ShapeDtypeStruct((rows, shapes["length"], shapes["embed_dim"]), shapes["dtype"]),
                linen.logical_to_mesh_sharding(P("activation_batch"), mesh, config.logical_axis_rules))

    def gradients(params, x_BLD, dy_BLD):
      y_BLD, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params, rest)(x)[0], params, x_BLD)
      return y_BLD, pull(dy_BLD)

    return jax.jit(gradients).lower(params, x_BLD, x_BLD)
