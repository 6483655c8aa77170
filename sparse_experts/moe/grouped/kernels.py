"""Grouped products by tokamax's kernels for TPUs and GPUs: backend `tokamax`, of the extra [kernels]."""

from jax import Array

from sparse_experts import partitioning
from sparse_experts.errors import UserError

# Of `tokamax.ragged_dot`, the first that has a kernel for the device and the shapes.
IMPLEMENTATIONS = {"tpu": ("mosaic",), "gpu": ("mosaic", "triton"), "cpu": ("xla",)}


def product(x_RD: Array, w_EDF: Array, size_E: Array) -> Array:
  """`jax.lax.ragged_dot`, but rows after the last group hold anything, and so do their gradients."""
  try:
    import tokamax
    from absl import flags  # which it brings
  except ModuleNotFoundError as e:
    raise UserError("backend='tokamax' needs the package tokamax; pip install -e '.[kernels]' installs it, "
                    "or choose 'ragged_dot'") from e
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # else it takes the command line of whatever program this is for its own
  platform, reasons = partitioning.platform(), []
  for implementation in IMPLEMENTATIONS[platform]:
    try:
      return tokamax.ragged_dot(x_RD, w_EDF, size_E, implementation=implementation)
    except NotImplementedError as e:
      reasons.append(str(e))
  raise UserError(f"backend='tokamax' has no {platform} kernel for rows {x_RD.shape} and experts "
                  f"{w_EDF.shape} in {x_RD.dtype} ({'; '.join(reasons)}); choose 'ragged_dot'")
