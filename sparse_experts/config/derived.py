"""What follows from several keys together: tokens of a row, and the seeds in use."""

from ml_collections import ConfigDict

from sparse_experts.config.schema import SEEDS
from sparse_experts.errors import UserError


def image_tokens(config: ConfigDict) -> int:
  """Tokens of an image: its patches, and the class token if there is one."""
  size, patch = config.data.image.size, config.model.patch_size
  if patch < 1 or size % patch:
    near = sorted(sorted((p for p in range(1, size + 1) if size % p == 0), key=lambda p: abs(p - patch))[:3])
    raise UserError(f"model.patch_size={patch} does not divide data.image.size={size}; choose a patch of "
                    f"{' or '.join(map(str, near))} pixels, or another image size")
  return (size // patch)**2 + (config.model.pool == "token")


def row_tokens(config: ConfigDict) -> int:
  """Tokens of a row with an image: the image's, and in a `limoe` the places for its text's."""
  if config.model.name != "limoe":
    return image_tokens(config)
  if config.model.pool != "mean":
    raise UserError(f"model.pool='{config.model.pool}' reads a class token, but a limoe compares means over "
                    "tokens; choose model.pool=mean")
  return image_tokens(config) + config.data.length


def seeds(config: ConfigDict) -> dict[str, int]:
  """The three seeds of a run: `config.seed.*`, each `config.train.seed` unless set."""
  return {n: config.train.seed if config.seed[n] is None else config.seed[n] for n in SEEDS}
