"""Random damage of the files of a folder, as hypothesis draws it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from hypothesis import strategies as st

# What may stand in JSON in the place of something else.
STRANGE = [None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e300, float("inf"), float("nan"), 2**31,
           2**63, 2**70, 10**30, "", "x", "0", "1e999", "\0", "\ud800", "../x", "os:system", "é" * 300,
           "A" * 70_000, [], [1], [[]], [None], ["a", 2], [0.5, "x"], {}, {"a": 1}, {"step": []}, [[]] * 50]


@dataclasses.dataclass(frozen=True)
class Damage:
  """What happens to a file: `kind`, and numbers from 0 to 1 that say where and how much."""

  kind: str
  file: float
  at: float
  much: float
  value: Any


BYTES = ("flip", "digit", "cut", "zeros", "noise", "more", "less", "twice")
FILES = ("gone", "folder", "swap", "copy", "link", "loop", "nowhere", "pipe", "step")
JSON = ("value", "value", "value", "no key", "new key", "key twice", "wrapped")


def damages(kinds=(*BYTES, *FILES, *JSON)):
  """A few of them; one most of the time."""
  part = st.integers(0, 10**6 - 1).map(lambda n: n / 10**6)  # floats would mostly be 0 and 0.5
  one = st.builds(Damage, st.sampled_from(kinds), part, part, part, st.sampled_from(STRANGE))
  return st.lists(one, min_size=1, max_size=3)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """In an order that does not depend on names that are drawn when they are written."""
  found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
  return sorted(found, key=lambda path: (str(path.relative_to(folder).parent), path.stat().st_size))


def apply(damage: Damage, folder: pathlib.Path) -> str:
  """Does it; returns the name of what was hit, with what happened."""
  there = files(folder)
  small = [path for path in there if "state" not in str(path.relative_to(folder))]
  pool = small if damage.kind in JSON else there + 4 * small
  if not pool:
    return "nothing is left"
  path = pool[int(damage.file * len(pool))]
  other = there[int(damage.at * len(there))]
  if damage.kind in BYTES:
    _put(path, _spoil(damage, path.read_bytes()))
  elif damage.kind in FILES:
    _misplace(damage, path, other, folder)
  elif path.suffix == ".safetensors":
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = _rewrite(damage, content[8:size]).rstrip()
    _put(path, len(header).to_bytes(8, "little") + header + content[size:])
  else:
    _put(path, _rewrite(damage, path.read_bytes()))
  return f"{damage.kind}: {path.relative_to(folder)}"


def _put(path, content):
  """A new file of that name: the old one may have others."""
  path.unlink()
  path.write_bytes(content)


def _spoil(damage, content):
  size = len(content)
  i = int(damage.at * size)
  n = max(1, int(damage.much**3 * size))
  if damage.kind == "flip" and size:
    return content[:i] + bytes([content[i] ^ 1 << int(damage.much * 8)]) + content[i + 1:]
  if damage.kind == "digit" and (digits := [k for k, b in enumerate(content) if 48 <= b < 58]):
    k = digits[int(damage.at * len(digits))]
    other = (content[k] - 48 + 1 + int(damage.much * 9)) % 10
    return content[:k] + str(other).encode() + content[k + 1:]
  noise = bytes((k * 97 + int(damage.much * 10**6)) * 31 % 251 for k in range(min(n, 4000)))
  before, after = content[:i], content[i + n:]
  return {"cut": before, "zeros": before + bytes(n) + after, "more": before + noise + content[i:],
          "noise": before + noise + after, "less": before + after, "twice": content[:i + n] + content[i:],
          }.get(damage.kind, content)


def _misplace(damage, path, other, folder):
  if damage.kind == "step":
    _misplace_step(damage, folder / "checkpoints")
    return
  content, others = path.read_bytes(), other.read_bytes()
  path.unlink()
  if damage.kind == "swap":
    path.write_bytes(others)
    if other != path:
      _put(other, content)
  elif damage.kind == "folder":
    path.mkdir()
    (path / "x").write_bytes(content[:10])
  elif damage.kind == "copy":
    path.write_bytes(others if other != path else b"")
  elif damage.kind == "pipe":
    os.mkfifo(path)
  elif damage.kind != "gone":
    path.symlink_to({"link": other, "loop": path.name, "nowhere": "gone/away"}[damage.kind])


def _misplace_step(damage, checkpoints):
  steps = sorted(checkpoints.glob("[0-9]*"))
  if not steps:
    return
  step = steps[int(damage.file * len(steps))]
  to = checkpoints / ["7", "03", "-1", "1.tmp", "x", "99999999999999999999"][int(damage.at * 6)]
  if damage.much < 0.3 and not to.exists():
    with contextlib.suppress(shutil.Error):  # of pipes and links of other damage; the rest is copied
      shutil.copytree(step, to)
  elif damage.much < 0.6 and not to.exists():
    step.rename(to)
  elif damage.much < 0.8 and len(steps) > 1:
    a, b, aside = steps[0], steps[1], checkpoints / "aside"
    for old, new in ((a, aside), (b, a), (aside, b)):
      old.rename(new)
  else:
    shutil.rmtree(step)


def _rewrite(damage, content):
  """A JSON file, or a line of one of lines, with something else in one place."""
  lines = content.splitlines(keepends=True)
  try:
    json.loads(content)
    lines, n = [content], 0
  except ValueError:
    n = int(damage.much * len(lines)) if lines else 0
  try:
    tree = json.loads(lines[n])
  except (ValueError, IndexError):
    return json.dumps(damage.value).encode()
  places = list(_places(tree))
  if damage.kind == "wrapped" or not places:
    new = json.dumps([tree] if damage.much < 0.5 else {"a": tree})
  else:
    holder, key = places[int(damage.at * len(places))]
    if damage.kind == "value":
      holder[key] = damage.value
    elif damage.kind == "no key":
      del holder[key]
    elif isinstance(holder, dict):
      holder[["new", "step", "", "__class__", str(key).upper()][int(damage.much * 5)]] = damage.value
    new = json.dumps(tree)
    if damage.kind == "key twice" and isinstance(tree, dict) and tree:
      name = sorted(tree)[int(damage.at * len(tree))]
      new = new[:-1] + f", {json.dumps(name)}: {json.dumps(damage.value)}}}"
  return b"".join([*lines[:n], new.encode("utf-8", "replace") + b"\n", *lines[n + 1:]])


def _places(tree):
  """(holder, key) of everything in a JSON tree."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
  for key, value in items:
    yield tree, key
    yield from _places(value)
