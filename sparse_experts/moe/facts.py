"""What is known of each router and mixture layer, from its class: for `describe --routers` and the docs."""

import dataclasses
import inspect
import re
from typing import Any

from flax import nnx

from sparse_experts.moe.mixtures.mixture import MixtureLayer
from sparse_experts.moe.registry import LAYERS, ROUTERS, make_router
from sparse_experts.moe.routing import Convention, Router

# As docstrings name papers: "Fedus et al. 2021", "DeepSeek-AI 2024"; a second name tells two papers apart.
_PAPER = re.compile(
    r"[A-Z][\w-]+(?:, [A-Z]\w+(?= et al))? (?:et al\. |and [A-Z]\w+ )?(?:19|20)\d\d")
KS = (1, 2, 3)  # what conventions may tell apart: one expert per token, two, more


@dataclasses.dataclass(frozen=True)
class Facts:
  """One router or mixture layer, with the arguments that it has by default.

  capacity, layer_losses: its convention in words, by k where that matters. losses: {name: coefficient}.
  held_to: whose code or formula the tests' values come from.
  """

  name: str
  cls: type[Router] | type[MixtureLayer]
  causality: str
  capacity: str
  losses: dict[str, float]
  layer_losses: str
  arguments: dict[str, Any]

  @property
  def summary(self) -> str:
    return (inspect.getdoc(self.cls) or "").partition("\n")[0]

  @property
  def papers(self) -> list[str]:
    return list(dict.fromkeys(_PAPER.findall(re.sub(r"\s+", " ", inspect.getdoc(self.cls) or ""))))

  @property
  def coefficients(self) -> str:
    """The losses that count, in words."""
    return ", ".join(f"{name} {weight:.3g}" for name, weight in self.losses.items() if weight)

  @property
  def held_to(self) -> str:
    return self.cls.held_to


def all_facts() -> list[Facts]:
  """Every name that `model.router.name` takes."""
  return [_of_router(name, cls) for name, cls in ROUTERS.items()] + [
      Facts(name, cls, cls.causality, "dropless", {}, "", _arguments(cls)) for name, cls in LAYERS.items()]


def _of_router(name: str, cls: type[Router]) -> Facts:
  router, arguments = _make(name), _arguments(cls)
  own = {router.k: cls.convention(router.k)}
  if "k" in arguments:
    own |= {k: cls.convention(k) for k in KS}
  weights = router.loss_weights | router.reward_weights
  return Facts(name, cls, router.causality, _by_k(own, "capacity"), weights,
               _by_k(own, "layer_losses") if weights else "", arguments)


def _make(name: str) -> Any:
  return make_router(name, 8, 8, rngs=nnx.Rngs(params=0))


def _by_k(own: dict[int, Convention], field: str) -> str:
  """The field of all conventions, once if it is the same for each k."""
  said: dict[str, list[int]] = {}
  for k, convention in sorted(own.items()):
    said.setdefault(getattr(convention, field), []).append(k)
  if len(said) == 1:
    return next(iter(said))
  form = lambda ks: " or ".join(f"{k}{'+' if k == max(KS) else ''}" for k in ks)
  return "; ".join(f"k={form(ks)}: {words}" for words, ks in said.items())


def _arguments(cls: Any) -> dict[str, Any]:
  return {p.name: p.default for p in inspect.signature(cls.__init__).parameters.values()
          if p.default is not p.empty}
