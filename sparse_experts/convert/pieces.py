"""How foreign tensors lie in our parameters: pieces, each a view of both sides, used in both directions."""

import dataclasses
import math

import numpy as np

Index = tuple[int | slice, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
  """own[at] is foreign.reshape(view)[part].transpose(axes), without copying.

  own: a parameter or buffer by its name of one layer (`models/names.py`). shape: of the foreign tensor.
  copy: the foreign tensor repeats another one, and has to be equal to it where it is read. spare: it may also
    be missing there, and is not written.
  """

  foreign: str
  shape: Shape
  own: str
  at: Index = ()
  view: Shape | None = None
  part: Index = ()
  axes: tuple[int, ...] | None = None
  copy: bool = False
  spare: bool = False

  def of(self, foreign: np.ndarray) -> np.ndarray:
    """What the foreign array, or the buffer for one, holds of own[at]."""
    a = foreign.reshape(self.shape if self.view is None else self.view)[self.part]
    return a if self.axes is None else a.transpose(self.axes)

  @property
  def block(self) -> Index:
    """Leading whole numbers of `at`: the part of `own` that lies in one place."""
    n = next((i for i, index in enumerate(self.at) if isinstance(index, slice)), len(self.at))
    return self.at[:n]


class Pieces:
  """Collects the pieces of a model whose own shapes are known."""

  def __init__(self, shapes: dict[str, Shape]):
    self.shapes, self.found = shapes, []

  def same(self, foreign: str, own: str, *, flat: bool = False, **kind: bool) -> None:
    """The same axes, or all of them as one. `kind`: `copy` and `spare`."""
    shape = self.shapes[own]
    self.found.append(Piece(foreign, (math.prod(shape),) if flat else shape, own, view=shape, **kind))

  def linear(self, foreign: str, own: str, *, inputs: int = 1, at: Index = (),
             fused: tuple[Shape, Index] | None = None) -> None:
    """A weight [out, in] whose axes in `own` are in, out; `inputs` of them make up in.

    fused: (shape of the foreign tensor, the part of it that is this weight).
    """
    shape = self.shapes[own][len(at):]
    n = len(shape) - inputs
    turned = shape[inputs:] + shape[:inputs]  # out, in
    axes = (*range(n, len(shape)), *range(n))
    if fused is not None:
      self.found.append(Piece(foreign, fused[0], own, at, part=fused[1], axes=axes))
      return
    whole = (math.prod(turned[:n]), math.prod(turned[n:]))
    self.found.append(Piece(foreign, whole, own, at, view=turned, axes=axes))

  def add(self, *args, **kwargs) -> None:
    self.found.append(Piece(*args, **kwargs))

  def check(self) -> list[Piece]:
    """The pieces. Raises ValueError for parameters that they do not make up."""
    size = dict.fromkeys(self.shapes, 0)
    for piece in self.found:
      if not piece.copy:
        size[piece.own] += np.broadcast_to(False, self.shapes[piece.own])[piece.at].size
    wrong = [name for name, n in size.items() if n != math.prod(self.shapes[name])]
    if wrong:
      raise ValueError(f"pieces do not make up {', '.join(wrong)}")
    return self.found
