"""A step compiled from shapes: for simulated devices here, the same function as for a TPU's."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sparse_experts.aot import chips, cost, estimate, fit
from sparse_experts.aot import program as aot
from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.profiling import hlo
from tests.training.tiny import tiny_config

BYTES = 384  # ids of the bytes tokenizer
V5E = chips.Slice("v5e:2x4", chips.CHIPS["v5e"], (2, 4), [])


def shapes(config):
  return aot.Shapes(config, make_tokenizer("bytes"))


def test_a_step_for_eight_devices():
  """Two all-to-alls each way, two more recomputed, and memory whose parts are those of the shapes."""
  config = tiny_config(mesh__data=2, mesh__expert=4, model__remat=True, model__dispatch="scatter")
  before = len(jax.live_arrays())
  plan = shapes(config).plan(config, jax.devices())
  program = aot.compile_step(plan)
  assert len(jax.live_arrays()) <= before  # no weight was made
  found = cost.summary(program)
  exchange = found["per_sparse_layer"]["all-to-all"]
  assert {phase: c["count"] for phase, c in exchange.items()} == dict.fromkeys(
      ("forward", "recomputed", "backward"), 2)
  total = found["collectives"]["all-to-all"]
  assert (total["count"], total["recomputed_count"], total["at_least"]) == (4, 2, False)
  # There and back, of one group a device: 8 experts' slots of 16 numbers, of which a quarter stays.
  capacity = plan.model.sparse_layers["decoder/01"].capacity
  assert exchange["forward"]["bytes"] == 2 * 8 * capacity * 16 * 4 * 3 / 4

  parts = found["hbm_per_chip_gib"]
  assert sum(v for k, v in parts.items() if k != "peak") == pytest.approx(parts["peak"])
  experts = 8 * 3 * 16 * 32 * 4
  assert parts["parameters"] * aot.GIB == 4 * found["params_total"] - experts * 3 / 4
  assert parts["temporaries"] > 0 and found["chips"] == 8 and "fits" not in found


def test_the_mesh_must_be_all_of_the_devices():
  config = tiny_config(mesh__data=2)
  with pytest.raises(UserError, match="uses 2 devices of 8; set --config.mesh.* or let --find") as e:
    shapes(config).plan(config, jax.devices())
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("remat, again", [(False, 3), (True, 4)])
def test_flops_of_a_step_by_hand(remat, again):
  """2 per multiply-add, of 8 rows of 32: forward and two backward, layers once more with remat, no head."""
  config = tiny_config(model__num_layers=2, model__remat=remat, model__router__k=2)
  d, f, heads, rows, length, experts = 16, 32, 16, 8, 32, 8
  layer = 2 * 4 * d * heads + 4 * heads * length
  dense, sparse = 2 * 3 * d * f, 2 * 2 * 3 * d * f + 2 * d * experts
  head = 2 * d * BYTES
  executed = again * (2 * layer + dense + sparse) + 3 * head
  visible = 2 * (2 * 4 * d * heads + 4 * heads * (length + 1) / 2)
  found = shapes(config).plan(config, jax.devices()[:1]).counts()
  assert found["flops"] == executed * rows * length
  assert found["model_flops"] == 3 * (visible + dense + sparse + head) * rows * length


def program_by_hand(where=V5E):
  """Of a mesh 2 x 4 laid out on a slice of 2 x 4 chips."""
  places = np.array([SimpleNamespace(coords=(x, y, 0), slice_index=0) for x in range(2) for y in range(4)])
  arguments = {"parameters": 400, "optimizer": 800, "router_state": 0, "batch": 16}
  plan = SimpleNamespace(
      config=tiny_config(model__remat=True), arguments=lambda: arguments,
      mesh=SimpleNamespace(devices=places, size=8), model=SimpleNamespace(sparse_layers={"decoder/01": None}),
      counts=lambda: {"flops": 8e9, "model_flops": 6e9, "params_total": 1000, "params_active": 500})
  rows, everyone = np.arange(8).reshape(2, 4), np.arange(8).reshape(1, 8)
  sent = [hlo.Collective("all-to-all", 4, 1000.0, rows, "jit(f)/jvp()/all_to_all/all_to_all", True),
          hlo.Collective("all-to-all", 2, 500.0, rows, "rematted_computation/all_to_all/all_to_all", True),
          hlo.Collective("all-reduce", 1, 3000.0, everyone, "jit(f)/transpose(jvp())/dot", True),
          hlo.Collective("send", 1, 70.0, everyone, "", False)]
  memory = arguments | {"padding": 4, "temporaries": 100, "outputs": 20, "program": 10}
  return aot.Program(plan, 2.0, memory, sent)


def test_a_summary_by_hand():
  found = cost.summary(program_by_hand(), V5E)
  assert found["collectives"]["all-to-all"] == {
      "count": 4, "bytes": 1000, "recomputed_count": 2, "recomputed_bytes": 500, "at_least": False}
  assert found["collectives"]["send"]["at_least"]
  assert found["per_sparse_layer"] == {"all-to-all": {
      "forward": {"count": 4, "bytes": 1000}, "recomputed": {"count": 2, "bytes": 500}}}
  assert found["hbm_per_chip_gib"]["peak"] * aot.GIB == 1350 and found["fits"]
  assert (found["flops_per_chip"], found["model_flops_per_chip"]) == (1e9, 0.75e9)
  chip = chips.CHIPS["v5e"]
  hops = (3 * 1 + 2 * 2 + 1 * 3) / 6  # four chips in a row
  terms = {"compute": 1e9 / chip.flops, "hbm": (2 * 1220 + 3 * 400 + 2 * 100 + 20) / chip.hbm,
           "interconnect": (1500 * hops + 3000) / chip.ici, "dcn": 70 / chip.dcn}
  assert found["estimated_step_seconds"] == pytest.approx(
      terms | {"overlapped": max(terms.values()), "serial": sum(terms.values())})


def test_what_is_too_large_does_not_fit():
  message = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
             "required (1.17T) exceeds available HBM (15.75G).\nSee a page")
  program = aot.Program(program_by_hand().plan, 1.0, None, None, aot._memory_message(message))
  assert program.too_large.startswith("Ran out of memory on HBM") and program.too_large.endswith("(15.75G).")
  found = cost.summary(program, V5E)
  assert found["fits"] is False and found["hbm_per_chip_gib"]["peak"] is None
  assert found["hbm_per_chip_gib"]["parameters"] * aot.GIB == 400


SIZES = {"v5e:1x1": 1, "v5e:2x2": 4, "v5e:2x4": 8}


@pytest.fixture
def search(monkeypatch):
  """search(config, room, temporaries): the tries of a search, its lines, the figures of all candidates.

  On slices of SIZES chips with room for so many times the arguments of one device. `temporaries(plan)`: bytes
  that a fake compiler adds to the arguments, or its message that they are too many.
  """

  def search(config, room, temporaries):
    made = shapes(config)
    whole = sum(made.plan(config, jax.devices()[:1]).arguments().values())
    chip = chips.Chip(1, 0, room * whole / aot.GIB, 1, 1, 1, 1, 2, 16)
    get = lambda name: chips.Slice(name, chip, (1, SIZES[name]), jax.devices()[:SIZES[name]])

    def compile_step(plan):
      found = temporaries(plan)
      if isinstance(found, str):
        return aot.Program(plan, 0.0, None, None, found)
      return aot.Program(plan, 0.0, plan.arguments() | {"temporaries": found}, [])

    monkeypatch.setattr(chips, "slices", lambda name: list(SIZES))
    monkeypatch.setattr(chips, "get_slice", get)
    monkeypatch.setattr(aot, "compile_step", compile_step)
    said = []
    tries = fit.find(made, config, "v5e", said.append)
    kept = estimate.kept(made, config)
    return tries, said, {name: dict(fit.meshes(made, config, get(name), kept)) for name in SIZES}

  return search


def test_find_takes_the_smallest_slice_that_fits(search):
  """What the compiler needs more than was estimated is expected of the next slices, too."""
  needs = lambda plan: 2 * expected(plan) - sum(plan.arguments().values())
  made = shapes(tiny_config())
  kept = estimate.kept(made, tiny_config())
  expected = lambda plan: round(estimate.peak(plan, kept))
  whole = sum(made.plan(tiny_config(), jax.devices()[:1]).arguments().values())
  of = {name: min(gib for _, gib in fit.meshes(made, tiny_config(), chips.Slice(
      name, V5E.chip, (1, n), jax.devices()[:n]), kept)) * aot.GIB / whole for name, n in SIZES.items()}
  room = of["v5e:2x2"] * 1.5  # by the estimate four chips are enough, by the compiler they are not
  assert 2 * of["v5e:2x4"] < room < of["v5e:1x1"]
  tries, said, _ = search(tiny_config(), room, needs)
  assert [t.where.name for t in tries] == ["v5e:2x2", "v5e:2x4"]
  assert tries[-1].fits and not tries[0].fits
  assert tries[0].mesh == fit.Mesh(data=1, expert=4, model=1, fsdp=False)
  assert said[0].startswith("v5e:1x1: no mesh is expected to fit (the least needs about ")
  assert said[1].startswith("v5e:2x2 data=1 expert=4 model=1 fsdp=False: ")
  assert said[1].endswith(" GiB a chip expected; compiling")


def test_find_compiles_at_most_four_by_slice_and_estimate(search):
  """Where the compiler does not say how much it needs, two of each slice: the preferred, then the least."""
  tries, said, figures = search(tiny_config(), 1000, lambda plan: "Ran out of memory")
  assert len(tries) == fit.MOST == 4 and not any(t.fits for t in tries)
  assert [t.where.name for t in tries] == ["v5e:1x1", "v5e:2x2", "v5e:2x2", "v5e:2x4"]
  assert sum(line.endswith("compiling") for line in said) == 4
  for name in ("v5e:2x2", "v5e:2x4"):
    meshes = [t.mesh for t in tries if t.where.name == name]
    assert meshes[0] == fit.Mesh(data=1, expert=SIZES[name], model=1, fsdp=False)
    if len(meshes) == 2:
      assert figures[name][meshes[1]] == min(figures[name].values()) < figures[name][meshes[0]]


def test_find_believes_the_compilers_message(search):
  """1 TiB for a model of kilobytes: nothing else is tried."""
  tries, said, _ = search(tiny_config(), 1000, lambda plan: "Used 1.00T of 15.75G hbm.")
  assert len(tries) == 1 and tries[0].gib == 1024
  assert all("no mesh is expected to fit" in line for line in said[2:]) and len(said) == 4


@pytest.mark.parametrize("message, gib", [
    ("Ran out of memory on HBM, the total memory required (1.17T) exceeds available HBM (15.75G).", 1198.08),
    ("the total memory required for HLO temporaries (119.89G) exceeds available HBM (95.74G).", 119.89),
    ("Used 23.50G of 15.75G hbm. Exceeded hbm capacity by 7.75G.", 23.5), ("Ran out of memory", None)])
def test_what_a_program_that_is_too_large_requires(message, gib):
  found = aot.Program(program_by_hand().plan, 1.0, None, None, message).required
  assert found is None if gib is None else found / aot.GIB == pytest.approx(gib)


def test_what_is_kept_for_the_backward_pass():
  """Recomputed layers keep what goes into them, 2 layers of [8, 32, 16] in float32, not what is within."""
  config = tiny_config(model__remat=True)
  again = estimate.kept(shapes(config), config)
  all_kept = estimate.kept(shapes(tiny_config()), tiny_config())
  assert all_kept.within == 0 and all_kept.between == pytest.approx(again.between + 2 * again.within)
  inputs = 2 * 8 * 32 * 16 * 4
  head = 8 * 32 * BYTES * 4
  assert inputs < again.between < 2 * (inputs + head) and again.within > inputs
  half = estimate.kept(shapes(config), tiny_config(model__remat=True, train__accumulate=2))
  assert half.between == pytest.approx(again.between / 2, rel=0.05)  # counts of the batch stay


def test_an_estimate_by_hand():
  config = tiny_config(mesh__data=2, mesh__expert=2, mesh__model=2)
  plan = shapes(config).plan(config, jax.devices())
  parts = plan.arguments()
  kept = estimate.Kept(between=800.0, within=80.0)
  assert estimate.peak(plan, kept) == sum(parts.values()) + parts["parameters"] + 200 + 10


def test_meshes_are_those_that_training_accepts():
  config = tiny_config()  # 8 rows, 2 heads
  where = chips.Slice("v5e:2x4", chips.CHIPS["v5e"], (2, 4), jax.devices())
  made = shapes(config)
  found = {tuple(mesh): gib for mesh, gib in fit.meshes(made, config, where, estimate.kept(made, config))}
  assert {mesh[2] for mesh in found} == {1, 2}
  assert len(found) == 2 * (4 + 3)
  assert found[1, 8, 1, False] < found[8, 1, 1, False] > found[8, 1, 1, True]
