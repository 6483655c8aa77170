"""The colour of an arm or a run, the same in the page and in every picture."""

import zlib
from collections.abc import Iterable

# Okabe and Ito 2008, distinguishable with every common colour blindness, without their black and their
# yellow, which vanish on a dark and on a white page; then wine, olive and teal of Paul Tol's muted scheme.
FIRST = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MORE = ("#882255", "#999933", "#44AA99", "#7F7F7F", "#6A51A3", "#B2182B", "#8C564B", "#1B7837", "#C51B7D",
        "#4D9DE0", "#A6761D", "#666699")


def colours(names: Iterable[str]) -> dict[str, str]:
  """{name: "#RRGGBB"} in the order of `names`; no two are equal for up to 18 names.

  A name prefers the colour that its own hash chooses of the first six, so it keeps it in another order and,
  unless an earlier name of the alphabet prefers the same, in other company. The others take what is free.
  """
  wanted = list(dict.fromkeys(names))
  free = [*FIRST, *MORE]
  given: dict[str, str] = {}
  for name in sorted(wanted):
    preferred = FIRST[zlib.crc32(name.encode()) % len(FIRST)]
    if preferred in free:
      free.remove(preferred)
      given[name] = preferred
  rest = [name for name in sorted(wanted) if name not in given]
  for i, name in enumerate(rest):
    given[name] = free[i] if i < len(free) else (*FIRST, *MORE)[i % (len(FIRST) + len(MORE))]
  return {name: given[name] for name in wanted}
