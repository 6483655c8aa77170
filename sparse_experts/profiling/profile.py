"""Splits the time of a train step by parts: `train --profile=STEPS` records some steps and prints a table.

The parts of a model are named scopes (`jax.named_scope("router")`), which cost nothing at run time and
stay in the metadata of every instruction made from them, also in the backward pass. A recorded trace
holds when each instruction ran on each device; the text of the compiled step gives its scope.
"""

import collections
import contextlib
import dataclasses
import glob
import itertools
import os
import re
import time
from collections.abc import Iterable
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from sparse_experts.errors import UserError
from sparse_experts.profiling.hlo import instructions
from sparse_experts.storage import Outbox

WARM_UP = 2  # steps after compiling
# Scope -> line of the table; an instruction belongs to its innermost scope.
SCOPES = {
    "router": "router", "dispatch": "dispatch", "all_to_all": "all-to-all", "experts": "experts",
    "combine": "combine", "attention": "attention", "dense_ffn": "dense FFN", "head": "head + loss",
    "loss": "head + loss", "optimizer": "optimizer"}
COLLECTIVES, OTHER, UNATTRIBUTED, IDLE = "other collectives", "other", "unattributed", "idle"
PARTS = (*dict.fromkeys(SCOPES.values()), COLLECTIVES, OTHER, UNATTRIBUTED, IDLE)
_CONTAINERS = ("while", "conditional", "call", "async-start", "async-done")
_COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective")


@dataclasses.dataclass(frozen=True)
class Event:
  """An instruction that ran; a `thread` runs one instruction at a time."""

  device: str
  thread: str
  op: str
  start: float  # ns
  end: float


@dataclasses.dataclass(frozen=True)
class Table:
  """Seconds per step, averaged over this process's devices; the parts add up to the total."""

  total: float
  parts: dict[str, float]
  backward: dict[str, float]  # what of them belongs to the backward pass

  def __str__(self) -> str:
    rows = [f"{'part':<18}{'ms per step':>12}{'share':>8}{'backward':>10}"]
    for part, seconds in self.parts.items():
      backward = f"{1e3 * self.backward[part]:>10.2f}" if self.backward[part] else ""
      rows.append(f"{part:<18}{1e3 * seconds:>12.2f}{seconds / self.total:>8.1%}{backward}")
    rows.append(f"{'step':<18}{1e3 * self.total:>12.2f}{1:>8.1%}{1e3 * sum(self.backward.values()):>10.2f}")
    return "\n".join(rows)


def make_table(events: Iterable[Event], hlo: str, seconds: float, steps: int) -> Table:
  """Splits `seconds` of `steps` steps by the instructions that ran.

  At each moment a device's time goes in equal parts to the instructions it is running, those that
  contain others (loops) only where they run nothing inside; where it runs none, it is idle.
  """
  instructions = read_hlo(hlo)
  spent: dict[tuple[str, bool], float] = collections.defaultdict(float)
  devices = collections.defaultdict(list)
  for event in events:
    devices[event.device].append(event)
  for own in devices.values():
    for running, ns in _moments(own):
      owners = [instructions.get(op, (UNATTRIBUTED, False, False)) for op in running]
      owners = [f for f in owners if not f[2]] or owners
      for part, backward, _ in owners:
        spent[part, backward] += ns / len(owners)
  scale = 1e-9 / (max(len(devices), 1) * steps)
  total = seconds / steps
  busy = sum(spent.values()) * scale
  get = lambda part, *ways: sum(spent[part, way] for way in ways) * scale
  parts = {part: get(part, False, True) for part in PARTS} | {IDLE: max(total - busy, 0.0)}
  parts = {part: s for part, s in parts.items() if s or part not in SCOPES.values()}
  return Table(max(total, busy), parts, {part: get(part, True) for part in parts})


def _moments(events: list[Event]):
  """([ops that run, the innermost of each thread], ns) of every stretch in which nothing begins or ends."""
  marks = sorted(mark for i, e in enumerate(events) if e.end > e.start
                 for mark in ((e.start, 1, -e.end, i), (e.end, 0, 0, i)))
  stacks: dict[str, list[int]] = collections.defaultdict(list)
  for (at, begins, _, i), (until, *_) in itertools.pairwise(marks):
    stack = stacks[events[i].thread]
    if begins:
      stack.append(i)
    else:
      stack.remove(i)
    if until > at and (running := [events[own[-1]].op for own in stacks.values() if own]):
      yield running, until - at


def read_hlo(text: str) -> dict[str, tuple[str, bool, bool]]:
  """Instruction -> (part, whether of the backward pass, whether it contains others), of a compiled module.

  A fusion without a name gets the part of most of its instructions.
  """
  parts, called, members = {}, {}, collections.defaultdict(list)
  for i in instructions(text):
    op_name = i.op_name
    parts[i.name] = (_part(i.opcode, op_name), "transpose(" in op_name, i.opcode in _CONTAINERS)
    members[i.computation].append(i.name)
    if i.opcode == "fusion" and "/" not in op_name and (calls := re.search(r"calls=%?([\w.\-]+)", i.rest)):
      called[i.name] = calls.group(1)
  for name, computation in called.items():
    kinds = collections.Counter(parts[m] for m in members[computation] if parts[m][0] != UNATTRIBUTED)
    if kinds:
      parts[name] = (*kinds.most_common(1)[0][0][:2], False)
  return parts


def _part(opcode: str, op_name: str) -> str:
  # Collectives that the compiler has joined are named (a:b:c).
  innermost = {next((SCOPES[word] for word in reversed(re.split(r"[/()]+", name)) if word in SCOPES), OTHER)
               for name in op_name.split(":")}
  if _COLLECTIVE.match(opcode):
    return "all-to-all" if innermost == {"all-to-all"} else COLLECTIVES
  if "/" not in op_name or len(innermost) > 1:
    return UNATTRIBUTED
  return innermost.pop()


def read_trace(folder: str, hlo: str) -> list[Event]:
  """Events of the newest trace under `folder` that are instructions of the module `hlo`.

  On CPU they are on the host's threads, with the device in their statistics; GPUs and TPUs have planes
  of their own. A TPU's has a line `XLA Ops`, whose events are named by the text of the instruction, and a
  line `XLA Modules` that says when which module ran.
  """
  found = os.path.join(glob.escape(folder), "plugins", "profile", "*", "*.xplane.pb")
  path = max(glob.glob(found), key=os.path.getmtime)
  (module,) = re.findall(r"\AHloModule ([\w.\-]+)", hlo)
  known = read_hlo(hlo).keys()
  events = []
  for plane in jax.profiler.ProfileData.from_file(path).planes:
    own = plane.name.startswith("/device:")
    runs = [(e.start_ns, e.start_ns + e.duration_ns) for line in plane.lines if line.name == "XLA Modules"
            for e in line.events if e.name.split("(")[0] == module]
    for number, line in enumerate(plane.lines):
      for event in line.events:
        if not own and event.name not in known:
          continue
        stats = dict(event.stats)
        if "hlo_op" in stats:
          op, is_ours = str(stats["hlo_op"]), str(stats.get("hlo_module", module)) == module
        else:
          op = event.name.split(" ")[0].lstrip("%")
          is_ours = line.name == "XLA Ops" and any(start <= event.start_ns < end for start, end in runs)
        if is_ours:
          device = plane.name if own else str(stats.get("device_ordinal", 0))
          events.append(Event(device, f"{plane.name}/{number}", op, event.start_ns,
                              event.start_ns + event.duration_ns))
  return events


class Log(Protocol):
  """What is needed of `training.log.Log`, which lies above."""

  def pause(self, state: Any) -> contextlib.AbstractContextManager[None]: ...

  def say(self, text: str) -> None: ...


class Profiler:
  """Runs train steps; records `steps` of them after the warm-up, then prints the table. 0: none.

  first: the step that training starts from. Raises UserError if too few are left after it.
  """

  def __init__(self, steps: int, folder: str, config: ConfigDict, first: int):
    begin, left = first + WARM_UP, config.train.steps - first
    if steps and steps > left - WARM_UP:
      raise UserError(
          f"--profile={steps} needs {steps + WARM_UP} steps, {WARM_UP} of them to warm up, but the run has "
          f"{left} left; " + (f"choose {left - WARM_UP} or fewer, or raise train.steps" if left > WARM_UP
                      else "raise train.steps"))
    self._window, self._folder = range(begin + 1, begin + steps + 1), folder
    self._outbox: Outbox | None = None
    self._pauses = (config.train.log_every, config.train.eval_every, config.train.checkpoint_every)
    self._done, self._seconds, self._recording = first, 0.0, contextlib.ExitStack()
    self._started: float | None = None
    # A cached program may be of a version with other scopes: by default the key has no metadata.
    self._with_metadata = (
        jax.config.jax_compilation_cache_include_metadata_in_key)  # type: ignore[attr-defined]  # added at run time
    jax.config.update("jax_compilation_cache_include_metadata_in_key", bool(steps) or self._with_metadata)

  def __call__(self, step: jax.stages.Compiled, arguments: tuple, log: Log) -> tuple[Any, Any]:
    """`step(*arguments)`; `log` pauses the clock and prints the table."""
    self._done += 1
    if self._done not in self._window:
      return step(*arguments)
    if self._done == self._window[0]:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # thousands of events a step
      with log.pause(arguments):
        self._outbox = Outbox(self._folder)
        jax.profiler.start_trace(self._outbox.folder, profiler_options=options)
      self._recording.callback(jax.profiler.stop_trace)
    if self._started is None:
      self._started = time.perf_counter()
    with jax.profiler.StepTraceAnnotation("train", step_num=self._done):  # marks the step for the profiler
      state, pairs = step(*arguments)
    last = self._done == self._window[-1]
    if last or any(self._done % every == 0 for every in self._pauses):  # what follows is not training
      jax.block_until_ready((state, pairs))
      self._seconds += time.perf_counter() - self._started
      self._started = None
    if last:
      with log.pause(state):
        self._recording.close()
        hlo = step.as_text() or ""
        assert self._outbox
        table = make_table(read_trace(self._outbox.folder, hlo), hlo, self._seconds, len(self._window))
        self._outbox.close()
        log.say(f"profile of steps {self._window[0]} to {self._done}, trace in {self._folder}\n{table}")
    return state, pairs

  def close(self) -> None:
    """Ends the recording, if one runs, and restores jax's setting."""
    self._recording.close()
    jax.config.update("jax_compilation_cache_include_metadata_in_key", self._with_metadata)
