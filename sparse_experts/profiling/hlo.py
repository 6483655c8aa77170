"""Reads the text of a compiled module: its instructions, and counts and bytes of its collectives.

XLA's own cost analysis counts the body of a loop once or not at all, depending on the backend; here a
collective is counted once per iteration of the loops around it.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

# kind -> bytes that one device sends, over the bytes of the result, for groups of n devices. Sums and
# gathers are rings; send's other half, recv, counts nothing.
SENT = {
    **dict.fromkeys(("all-to-all", "ragged-all-to-all", "all-gather"), lambda n: (n - 1) / n),
    "all-reduce": lambda n: 2 * (n - 1) / n, "reduce-scatter": lambda n: n - 1,
    **dict.fromkeys(("collective-permute", "collective-broadcast", "send"), lambda n: 1.0)}
# A start's result also holds the operand and a context.
_SECOND, _FIRST = ("all-gather-start", "ragged-all-to-all-start"), ("collective-permute-start", "send")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
  computation: str  # which it stands in
  name: str
  type: str
  opcode: str
  rest: str  # operands and attributes

  @property
  def op_name(self) -> str:
    """Its origin: scopes and transformations, `jit(f)/transpose(jvp())/router/dot`."""
    match = re.search(r'op_name="([^"]*)"', self.rest)
    return match.group(1) if match else ""


@dataclasses.dataclass(frozen=True)
class Collective:
  """An instruction that sends, all its executions in one step taken together.

  sent: bytes per device. groups: [groups, devices], indices in the mesh's order.
  bounded: False if the trip count of a loop around it depends on data; one iteration is then counted.
  """

  kind: str
  count: int
  sent: float
  groups: np.ndarray
  op_name: str
  bounded: bool

  @property
  def phase(self) -> str:
    """forward, recomputed (by `model.remat`), backward or update, by the names of jax's transformations."""
    if "rematted_computation" in self.op_name:
      return "recomputed"
    if "transpose(" in self.op_name:
      return "backward"
    return "forward" if "jvp(" in self.op_name else "update"


def instructions(text: str) -> Iterator[Instruction]:
  """All of a module's, computation by computation. A kernel's metadata may hold line breaks."""
  computation = ""
  for line in text.splitlines():
    if line and not line[0].isspace():
      if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
        computation = head.group(1)
    elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
      name, rest = match.groups()
      cut = _type_length(rest)
      opcode = re.match(r"\s*([\w\-]*)\(", rest[cut:])
      yield Instruction(computation, name, rest[:cut], opcode.group(1) if opcode else "", rest[cut:])


def _type_length(rest: str) -> int:
  """Length of the type, which may be a tuple of types; the opcode follows."""
  if not rest.startswith("("):
    return rest.find(" ")
  depths = itertools.accumulate((char == "(") - (char == ")") for char in rest)
  return next((i for i, depth in enumerate(depths, 1) if not depth), len(rest))


def collectives(text: str, devices: int) -> list[Collective]:
  """Those of a module that runs on `devices` devices. A start and its done are one; branches all count."""
  by_computation = collections.defaultdict(list)
  types: dict[tuple[str, str], str] = {}
  for i in instructions(text):
    by_computation[i.computation].append(i)
    types[i.computation, i.name] = i.type
  (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
  collected: list[Collective] = []

  def walk(computation: str, times: int, bounded: bool) -> None:
    for i in by_computation[computation]:
      kind = i.opcode.removesuffix("-start")
      if kind in SENT:
        groups = _groups(i.rest, devices)
        size = _bytes(_result(i))
        if kind == "ragged-all-to-all":  # the larger end has room for more rows than there are
          size = min(size, _bytes(types[computation, _operand(i)]))
        sent = SENT[kind](groups.shape[1]) * size
        if groups.shape[1] > 1 or kind in ("collective-permute", "send"):
          collected.append(Collective(kind, times, times * sent, groups, i.op_name, bounded))
      iterations = _trip_count(i, by_computation) if i.opcode == "while" else 1
      for callee in _callees(i):
        walk(callee, times * (iterations or 1), bounded and iterations is not None)

  walk(entry, 1, True)
  return collected


def _callees(i: Instruction) -> list[str]:
  """Computations that run when the instruction does; a reduction's rule sends nothing."""
  if i.opcode in ("async-update", "async-done"):
    return []
  names = re.findall(r"(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)", i.rest)
  if i.opcode == "call":
    names += re.findall(r"to_apply=%?([\w.\-]+)", i.rest)
  for branches in re.findall(r"branch_computations=\{([^}]*)\}", i.rest):
    names += [name.strip().lstrip("%") for name in branches.split(",")]
  return names


def _trip_count(loop: Instruction, by_computation: dict[str, list[Instruction]]) -> int | None:
  """The trip count of a loop, from the compiler's note or the condition i < n; None if it depends on data."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
    return int(known.group(1))
  condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
  inside = list(by_computation[condition.group(1)]) if condition else []
  inside += [i for outer in inside for name in _callees(outer) for i in by_computation[name]]
  compared = [i for i in inside if i.opcode == "compare" and "direction=LT" in i.rest]
  bounds = {int(n) for i in inside if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type)
            for n in re.findall(r"constant\((\d+)\)", i.rest)}
  return bounds.pop() if len(compared) == 1 and len(bounds) == 1 else None


def _result(i: Instruction) -> str:
  """The part of a result's type that is sent."""
  parts = _parts(i.type)
  if i.opcode in _SECOND and len(parts) > 1:
    return parts[1]
  return parts[0] if i.opcode in _FIRST else i.type


def _operand(i: Instruction) -> str:
  """The name of the first operand."""
  match = re.match(r"[^(]*\([^%]*%([\w.\-]+)", i.rest)  # its type may stand before
  return match.group(1) if match else ""


def _parts(kind: str) -> list[str]:
  """A tuple type's elements, or the type itself."""
  if not kind.startswith("("):
    return [kind]
  parts, depth, start = [], 0, 1
  for i, char in enumerate(kind):
    depth += (char in "([{") - (char in ")]}")
    if (char == "," and depth == 1) or not depth:
      parts.append(re.sub(r"/\*.*?\*/", "", kind[start:i]).strip())
      start = i + 1
  return parts


def _bytes(kind: str) -> int:
  """Of all arrays in a type; layouts and their padding do not count."""
  total = 0
  for name, shape in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", kind):
    digits = re.search(r"\d+", name)
    bits = _BITS[name] if name in _BITS else int(digits.group()) if digits else 0
    total += bits * math.prod(int(n) for n in shape.split(",") if n)
  return total // 8


def _groups(rest: str, devices: int) -> np.ndarray:
  """Which devices exchange with each other, in any of the three notations; of a permutation, its pairs."""
  if pairs := re.search(r"source_target_pairs=\{([\d,{}]*)\}", rest):
    return _listed(pairs.group(1))
  if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", rest):
    return _listed(listed.group(1))
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
    shape, dims, order = ([int(n) for n in g.split(",")] if g else [] for g in iota.groups())
    places = np.arange(math.prod(dims)).reshape(dims)
    return (places.transpose(order) if order else places).reshape(shape)
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    return _over(sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh.group(2)))
  return np.arange(devices).reshape(1, -1)


def _listed(text: str) -> np.ndarray:
  """{0,1},{2,3} as rows."""
  return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])


def _over(sizes: dict[str, int], over: list[tuple[str, str, str]]) -> np.ndarray:
  """Groups along axes of a mesh; 'a':(m)n is a part of an axis: its size n, m of them to the left of it."""
  inside = {name: (int(before or 1), int(n or sizes[name])) for name, before, n in over}
  axes: list[tuple[bool, int]] = []  # (whether devices along it exchange, size)
  for name, size in sizes.items():
    before, n = inside.get(name, (size, 1))
    axes += [(False, before), (True, n), (False, size // (before * n))]
  places = np.arange(math.prod(sizes.values())).reshape([size for _, size in axes])
  places = places.transpose(sorted(range(len(axes)), key=lambda i: axes[i][0]))
  return places.reshape(-1, math.prod(size for exchange, size in axes if exchange))
