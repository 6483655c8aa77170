"""The correspondence of foreign tensors and our parameters: pieces, used to read and to write."""

import dataclasses
import itertools
import math

import numpy as np

Index = tuple[int | slice, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
  """own[at] is foreign.reshape(view)[part].transpose(axes), without copying.

  own: a parameter or buffer by its name of one layer (`models/names.py`). shape: of the foreign tensor.
  copy: the foreign tensor repeats another one; reading checks that they are equal. spare: it may also be
    missing, and is not written.
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
    """The view of the foreign array, or of a buffer for it, that corresponds to own[at]."""
    a = foreign.reshape(self.shape if self.view is None else self.view)[self.part]
    return a if self.axes is None else a.transpose(self.axes)

  @property
  def block(self) -> Index:
    """Leading integers of `at`: the contiguous part of `own`."""
    return tuple(itertools.takewhile(lambda index: isinstance(index, int), self.at))


class Pieces:
  """Collects the pieces of a model whose own shapes are known."""

  def __init__(self, shapes: dict[str, Shape]):
    self.shapes = shapes
    self.pieces: list[Piece] = []

  def same(self, foreign: str, own: str, *, flat: bool = False, copy: bool = False,
           spare: bool = False) -> None:
    """The same axes, or all of them as one; `copy` and `spare` as of a Piece."""
    shape = self.shapes[own]
    foreign_shape = (math.prod(shape),) if flat else shape
    self.pieces.append(Piece(foreign, foreign_shape, own, view=shape, copy=copy, spare=spare))

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
      self.pieces.append(Piece(foreign, fused[0], own, at, part=fused[1], axes=axes))
      return
    whole = (math.prod(turned[:n]), math.prod(turned[n:]))
    self.pieces.append(Piece(foreign, whole, own, at, view=turned, axes=axes))

  def add(self, *args, **kwargs) -> None:
    self.pieces.append(Piece(*args, **kwargs))

  def check(self) -> list[Piece]:
    """The pieces. Raises ValueError unless they cover every parameter exactly once."""
    size = dict.fromkeys(self.shapes, 0)
    for piece in self.pieces:
      if not piece.copy:
        size[piece.own] += np.broadcast_to(False, self.shapes[piece.own])[piece.at].size
    wrong = [name for name, n in size.items() if n != math.prod(self.shapes[name])]
    if wrong:
      raise ValueError(f"pieces do not make up {', '.join(wrong)}")
    return self.pieces
