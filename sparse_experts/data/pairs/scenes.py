"""Generated pairs of an image and its caption: two coloured shapes, and where one is from the other.

"a small red circle above a big blue square": 48 objects, any two different ones, four relations.
"""

import functools

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40),
           "purple": (150, 60, 190), "black": (20, 20, 20)}
SIZES = {"small": 3.0, "big": 5.5}  # half the edge in pixels
# Which offsets from the middle, in half edges, a shape covers.
SHAPES = {
    "circle": lambda dy, dx: dy**2 + dx**2 <= 1,
    "square": lambda dy, dx: np.maximum(abs(dy), abs(dx)) <= 0.9,
    "triangle": lambda dy, dx: (dy <= 0.9) & (abs(dx) <= (dy + 1) / 2),
    "cross": lambda dy, dx: (np.minimum(abs(dy), abs(dx)) <= 0.35) & (np.maximum(abs(dy), abs(dx)) <= 1)}
# Where the second object is from the first: y, x.
RELATIONS = {"above": (1, 0), "below": (-1, 0), "left of": (0, 1), "right of": (0, -1)}
EDGE = 32  # pixels
_FIRST, _APART = 6.0, 11.0  # least distance of a middle from the edge, and of two middles

Thing = tuple[str, str, str]  # size, colour, shape


@functools.cache
def scenes(seed: int = 0) -> list[dict]:
  """Every caption once, with an image of its own: {"image": uint8 [32, 32, 3], "text": bytes}."""
  things = [(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]
  captions = [(a, relation, b) for a in things for relation in RELATIONS for b in things if a != b]
  return [{"image": draw(*caption, np.random.default_rng([seed, i])), "text": describe(*caption).encode()}
          for i, caption in enumerate(captions)]


def describe(first: Thing, relation: str, second: Thing) -> str:
  return f"a {' '.join(first)} {relation} a {' '.join(second)}"


def draw(first: Thing, relation: str, second: Thing, rng: np.random.Generator) -> np.ndarray:
  """Both somewhere on a light, noisy canvas, `second` in that direction from `first`."""
  along = np.array(RELATIONS[relation])
  middle_2 = rng.uniform(_FIRST, EDGE - _FIRST, (2, 2))  # of first and second: y, x
  axis = int(np.argmax(abs(along)))
  low = rng.uniform(_FIRST, EDGE - _FIRST - _APART)
  high = rng.uniform(low + _APART, EDGE - _FIRST)
  middle_2[:, axis] = (low, high) if along[axis] > 0 else (high, low)
  image = np.full((EDGE, EDGE, 3), 230.0) + rng.normal(0, 6, (EDGE, EDGE, 1))
  y, x = np.mgrid[:EDGE, :EDGE] + 0.5
  for (size, colour, shape), (cy, cx) in zip((first, second), middle_2, strict=True):
    covered = SHAPES[shape]((y - cy) / SIZES[size], (x - cx) / SIZES[size])
    image[covered] = COLOURS[colour]
  return np.clip(np.round(image), 0, 255).astype(np.uint8)
