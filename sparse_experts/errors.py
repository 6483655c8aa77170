"""One exception for mistakes a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake in a command, config or input: the command line prints it as one line and exits with 2.

  The message names the thing, its value and the way out.
  """


def nearest(name: str, known: Iterable[str]) -> str:
  """'; did you mean X?' for the closest known name, else '; known: A, B, C'."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
  return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
