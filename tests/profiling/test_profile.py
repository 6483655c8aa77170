"""A step's time is split by what ran, nothing is lost, and what has no name is called so."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.models import build
from sparse_experts.profiling import profile
from sparse_experts.profiling.profile import Event, Profiler, make_table, read_hlo
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.state import abstract_state, shardings
from sparse_experts.training.step import make_train_step
from tests.training.tiny import tiny_config, tiny_train
from tests.training.toy import toy_batch

HLO = """HloModule jit_train_step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %a = f32[4]{0} add(%p, %p), metadata={op_name="jit(train_step)/jvp(combine)/add"}
  %b = f32[4]{0} add(%a, %p), metadata={op_name="jit(train_step)/jvp(combine)/add"}
  ROOT %c = f32[4]{0} add(%b, %p), metadata={op_name="jit(train_step)/jvp(attention)/add"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %dot.1 = f32[4,4]{1,0:T(8,128)} dot(%x, %x), metadata={op_name="jit(f)/jvp()/while/body/router/dot"}
  %dot.2 = (f32[4]{0}, /*index=1*/(s32[])) fusion(%x), metadata={op_name="jit(f)/transpose(jvp(experts))/dot"}
  %loop = (s32[], f32[4]{0}) while(%t), metadata={op_name="jit(train_step)/jvp()/experts/while"}
  %x.1 = f32[4]{0} all-to-all(%x), metadata={op_name="jit(f)/transpose(jvp())/dispatch/all_to_all/all_to_all"}
  %r.1 = f32[4]{0} all-reduce(%x), metadata={op_name="jit(f)/(router/reduce_sum:attention/dot)"}
  %two = f32[4]{0} add(%x, %x), metadata={op_name="jit(f)/(router/reduce_sum:attention/dot)"}
  %copy.1 = f32[4]{0} copy(%x)
  %fill = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="broadcast.198"}
  ROOT %norm = f32[4]{0} add(%x, %x), metadata={op_name="jit(f)/jvp()/while/body/mul"}
}
"""


def test_an_instruction_belongs_to_its_innermost_scope():
  found = {name: (part, backward) for name, (part, backward, _) in read_hlo(HLO).items()}
  assert found == {
      "p": ("unattributed", False), "a": ("combine", False), "b": ("combine", False),
      "c": ("attention", False),
      "dot.1": ("router", False), "dot.2": ("experts", True), "loop": ("experts", False),
      "x.1": ("all-to-all", True), "r.1": ("other collectives", False), "two": ("unattributed", False),
      "copy.1": ("unattributed", False), "fill": ("combine", False), "norm": ("other", False)}


def test_time_goes_to_what_runs_and_adds_up():
  on = lambda thread, op, start, end, device="0": Event(device, thread, op, start * 1e6, end * 1e6)
  events = [
      on("a", "dot.1", 0, 10),  # alone for 4 ms, then beside dot.2
      on("b", "dot.2", 4, 10),
      on("a", "loop", 10, 30),  # a loop counts where nothing runs inside, on whatever thread
      on("b", "dot.2", 12, 22),
      on("a", "x.1", 23, 24),
      on("a", "x.1", 24, 24),  # took no time
      on("b", "unheard_of", 30, 32),
      on("c", "copy.1", 0, 20, device="1"),
      on("c", "dot.1", 5, 10, device="1"),  # its thread did this in between
  ]
  table = make_table(events, HLO, seconds=40e-3, steps=2)
  share = {name: 4 * 1e3 * seconds for name, seconds in table.parts.items()}  # two devices, two steps
  assert share == pytest.approx({
      "router": 4 + 3 + 5, "experts": 3 + 20 - 1, "all-to-all": 1, "unattributed": 2 + 15,
      "other": 0, "other collectives": 0, "idle": (40 - 32) + (40 - 20)})
  backward = {name: 4e3 * seconds for name, seconds in table.backward.items() if seconds}
  assert backward == pytest.approx({"experts": 13, "all-to-all": 1})
  assert table.total == pytest.approx(20e-3) and sum(table.parts.values()) == pytest.approx(table.total)
  assert str(table).splitlines()[1] == "router                    3.00   15.0%"
  assert str(table).splitlines()[-1] == "step                     20.00  100.0%      3.50"


# A trace as TPUs write it, and a GPU's stream: written from their documentation, no such device was at hand.
OTHER_DEVICES = """
planes {
  name: "/device:TPU:0"
  lines { name: "XLA Modules"
    events { metadata_id: 1 offset_ps: 1000 duration_ps: 9000 }
    events { metadata_id: 2 offset_ps: 20000 duration_ps: 9000 } }
  lines { name: "XLA Ops"
    events { metadata_id: 3 offset_ps: 2000 duration_ps: 3000 }
    events { metadata_id: 3 offset_ps: 21000 duration_ps: 3000 } }
  lines { name: "Framework Ops" events { metadata_id: 3 offset_ps: 2000 duration_ps: 3000 } }
  event_metadata { key: 1 value { id: 1 name: "jit_train_step(123)" } }
  event_metadata { key: 2 value { id: 2 name: "jit_eval_step(456)" } }
  event_metadata { key: 3 value { id: 3 name: "%dot.1 = f32[4,4]{1,0:T(8,128)} dot(%x, %x)" } }
}
planes {
  name: "/device:GPU:1"
  lines { name: "Stream #13(Compute)"
    events { metadata_id: 1 offset_ps: 5000 duration_ps: 2000
             stats { metadata_id: 1 str_value: "dot.2" }
             stats { metadata_id: 2 str_value: "jit_train_step" } }
    events { metadata_id: 1 offset_ps: 9000 duration_ps: 2000
             stats { metadata_id: 1 str_value: "dot.2" } stats { metadata_id: 2 str_value: "jit_add" } } }
  event_metadata { key: 1 value { id: 1 name: "gemm_kernel_f32" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
}
"""


def test_traces_of_other_devices(tmp_path):
  folder = tmp_path / "plugins" / "profile" / "now"
  folder.mkdir(parents=True)
  serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace(OTHER_DEVICES)
  (folder / "host.xplane.pb").write_bytes(serialized)
  assert [(e.device, e.op, e.start, e.end) for e in profile.read_trace(str(tmp_path), HLO)] == [
      ("/device:TPU:0", "dot.1", 2, 5), ("/device:GPU:1", "dot.2", 5, 7)]


def _table(err):
  """(header, {part: ms}) of the table on stderr."""
  header = re.search(r"profile of steps \d+ to \d+, trace in .*", err).group()
  lines = err[err.index("part  "):].splitlines()[1:]
  rows = [re.fullmatch(r"(.*?) +([\d.]+) +[\d.]+%(?: +[\d.]+)?", line) for line in lines]
  rows = rows[: rows.index(None) if None in rows else None]
  return header, {row[1]: float(row[2]) for row in rows}


class FakeLog:
  """Keeps what is said."""

  def __init__(self):
    self.said = ""

  def say(self, text):
    self.said += text

  def pause(self, state):
    return contextlib.nullcontext()


@pytest.mark.parametrize("first, boundary, seconds", [(0, 100, 1), (10, 13, 2)])
def test_steps_once_the_run_is_warm(first, boundary, seconds, tmp_path, monkeypatch):
  """Where the run does something else between two steps, that is no time of a step."""
  clock = iter(range(100))
  monkeypatch.setattr(profile.time, "perf_counter", lambda: next(clock))
  config = tiny_config(train__steps=first + 6, train__log_every=boundary, train__eval_every=100,
                       train__checkpoint_every=100)
  profiler, log = Profiler(2, str(tmp_path), config, first), FakeLog()
  step = jax.jit(lambda state, batch: (state @ batch, state.sum())).lower(jnp.eye(64), jnp.eye(64)).compile()
  state = jnp.eye(64)
  for _ in range(6):
    state, _ = profiler(step, (state, jnp.eye(64)), log)
  profiler.close()
  header, parts = _table(log.said)
  assert header == f"profile of steps {first + 3} to {first + 4}, trace in {tmp_path}"
  assert parts["step"] == 1000 * seconds / 2


def _profile(config, folder):
  """Parts of a step of the config's model, without a run around it."""
  mesh, log = partitioning.make_mesh(config.mesh.data, config.mesh.expert), FakeLog()
  model = build(config, 384)
  optimizer = make_optimizer(config, model.axes)
  with partitioning.use(mesh), contextlib.closing(Profiler(2, str(folder), config, 0)) as profiler:
    abstract = abstract_state(model, optimizer, mesh, False)
    state = jax.tree.map(lambda a: jax.device_put(jnp.zeros(a.shape, a.dtype), a.sharding), abstract)
    batch = jax.device_put(toy_batch(rows=8, length=32), partitioning.batch_sharding(mesh))
    key = jax.random.key(0)
    step = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0, out_shardings=(
        shardings(abstract), partitioning.replicated(mesh))).lower(state, batch, key).compile()
    for _ in range(4):
      state, _ = profiler(step, (state, batch, key), log)
  return _table(log.said)[1]


@pytest.mark.slow
def test_a_step_on_a_mesh(tmp_path):
  parts = _profile(tiny_config(mesh__data=2, mesh__expert=4), tmp_path)
  assert list(tmp_path.rglob("*.xplane.pb"))
  total = parts.pop("step")
  assert sum(parts.values()) == pytest.approx(total, abs=0.005 * len(parts))  # printed to 0.01 ms
  for part in ("router", "dispatch", "all-to-all", "experts", "combine", "attention", "dense FFN",
               "head + loss", "optimizer", "other collectives", "other"):
    assert parts[part] > 0, part
  assert parts["unattributed"] < 0.2 * total


@pytest.mark.slow
def test_a_dense_model_has_no_parts_of_sparse_layers(tmp_path):
  parts = _profile(tiny_config(model__num_experts=0), tmp_path)
  assert not {"router", "dispatch", "all-to-all", "experts", "combine"} & parts.keys()
  assert parts["attention"] > 0 and parts["dense FFN"] > 0


@pytest.mark.slow
def test_training_goes_on_as_normal(whole, tmp_path, capsys):
  before = jax.config.jax_compilation_cache_include_metadata_in_key
  run = tiny_train(tmp_path, profile=2)
  header, parts = _table(capsys.readouterr().err)
  assert header == f"profile of steps 3 to 4, trace in {tmp_path}/profile" and parts["experts"] > 0
  assert jax.config.jax_compilation_cache_include_metadata_in_key == before
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((run.params, whole[1].params)))


@pytest.mark.slow
def test_a_resumed_run_whose_program_comes_from_the_cache(tmp_path, capsys):
  tiny_train(tmp_path, train__steps=3, profile=1)
  tiny_train(tmp_path, train__steps=6, profile=1)
  first, second = capsys.readouterr().err.split("resuming")
  for text, done in ((first, 3), (second, 6)):
    header, parts = _table(text)
    assert header.startswith(f"profile of steps {done} to {done},")
    assert parts["router"] > 0 and parts["experts"] > 0


@pytest.mark.parametrize("steps, line", [
    (4, "--profile=3 needs 5 steps, 2 of them to warm up, but the run has 4 left; choose 2 or fewer, or .*"),
    (2, "--profile=3 needs 5 steps, .* the run has 2 left; raise train.steps")])
def test_more_steps_than_are_left(steps, line, tmp_path):
  with pytest.raises(UserError, match=line):
    Profiler(3, str(tmp_path), tiny_config(train__steps=10 + steps), 10)
