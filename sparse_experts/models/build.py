"""From a config to a model: `build` looks the family up, which builds itself."""

from collections.abc import Callable, Iterator

from flax import nnx

from sparse_experts.config import ConfigDict
from sparse_experts.errors import UserError, nearest
from sparse_experts.models.decoder import Decoder
from sparse_experts.models.limoe import LIMoE
from sparse_experts.models.model import Model
from sparse_experts.models.seq2seq import Seq2Seq
from sparse_experts.models.sparse import PHASES, SparseSpec
from sparse_experts.models.vit import ViT
from sparse_experts.moe import LAYERS, ROUTERS, Router, Routing

# model.name -> its class
MODELS: dict[str, type[Model]] = {"decoder": Decoder, "seq2seq": Seq2Seq, "vit": ViT, "limoe": LIMoE}


def build(config: ConfigDict, vocab_size: int, phase: str = "train", *, router: Router | None = None,
          edit: Callable[..., Routing] | None = None) -> Model:
  """The model of `config.model`. All phases have the same params and differ in what gets dropped.

  vocab_size: of a `vit`, the number of classes; of a `limoe`, that of its texts' ids.
  phase: `train` and `eval_capacity` use that capacity factor, `dropless` none.
  router: an instance that every sparse layer starts from, instead of `config.model.router`.
  edit: changes every routing before the dispatch (see `moe/edits.py`), for experiments on a trained model.
  """
  if phase not in PHASES:
    raise UserError(f"phase='{phase}' is unknown{nearest(phase, PHASES)}")
  spec = SparseSpec.from_config(config.model, phase, router, edit)
  return MODELS[config.model.name].build(config, vocab_size, spec)


def user_routers(config: ConfigDict) -> Iterator[Router]:
  """One of each router that `config` names by `package.module:Class`, for `moe.check_router`."""
  spec = SparseSpec.from_config(config.model, "train")
  own = spec.override(config.model.decoder)
  same = (own.router, own.num_experts) == (spec.router, spec.num_experts)
  for each in [spec] if same else [spec, own]:
    if each.num_experts and each.router["name"] not in (*ROUTERS, *LAYERS):
      yield each.make_router(config.model.embed_dim, rngs=nnx.Rngs(params=0))
