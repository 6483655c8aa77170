"""Foreign checkpoints give the logits that their own code gave, and come out again as they went in.

transformers wrote them and computed the logits: make_reference.py.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_experts import cli, partitioning, storage
from sparse_experts.config import read_config
from sparse_experts.convert.eight_bits import Rule
from sparse_experts.convert.files import Folder
from sparse_experts.convert.layouts import get_layout
from sparse_experts.convert.read import read
from sparse_experts.convert.write import foreign_config, write
from sparse_experts.data import make_tokenizer
from sparse_experts.errors import UserError
from sparse_experts.models import build, names
from sparse_experts.training import init_from
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.checkpoints.mapped import restore_mapped
from sparse_experts.training.optimizer import make_optimizer
from sparse_experts.training.run import load
from sparse_experts.training.state import abstract_state, make_state
from tests import full_disk
from tests.convert.checkpoints import DATA, NAMES, changed, config_of, reference, save, tensors
from tests.models.tiny import jit
from tests.training.tiny import documents, tiny_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """name -> work directory of that reference checkpoint, read once."""
  @functools.cache
  def run(name):
    workdir = tmp_path_factory.mktemp("run") / name
    read(str(DATA / name), str(workdir))
    return workdir

  return run


def arrays(workdir, folder):
  folder.mkdir()
  with Checkpoints(wd.checkpoints(str(workdir))) as checkpoints:
    return restore_mapped(checkpoints, ("params", "buffers"), 0, str(folder))


# Others of a family differ from it by a field, whose own tests are in test_fields.py.
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("deepseek_v3_yarn", "switch_untied")))
    for name in NAMES])
def test_logits_are_those_of_transformers(name, runs):
  batch, expected = reference(name)
  assert expected.std() > 0.5
  logits, _ = load(str(runs(name))).model(batch)  # XLA:CPU's quicker levels take minutes for these widths
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(name, runs, tmp_path):
  """Names, shapes, types and values of each tensor; and read again, each bit of the parameters."""
  written = tmp_path / "hf"
  write(str(runs(name)), str(written), config_of(name)["model_type"])
  before, after = tensors(DATA / name), tensors(written)
  describe = lambda found: {key: (a.shape, a.dtype) for key, a in found.items()}
  assert describe(after) == describe(before)
  if name != "deepseek_v3_yarn":  # which holds halves where pairs are written
    for key, a in before.items():
      np.testing.assert_array_equal(after[key], a, err_msg=key)
  read(str(written), str(tmp_path / "again"))
  own, again = arrays(runs(name), tmp_path / "a"), arrays(tmp_path / "again", tmp_path / "b")
  assert own.keys() == again.keys()
  for key, a in own.items():
    np.testing.assert_array_equal(again[key], a, err_msg=key)


def fused(arrays):
  """Mixtral's tensors as transformers 5 holds them in memory: the experts of a layer together."""
  found = {}
  for name, a in arrays.items():
    layer, where, rest = name.partition("block_sparse_moe.")
    if not where:
      found[name] = a
    elif rest == "gate.weight":
      found[f"{layer}mlp.gate.weight"] = a
    elif rest.endswith("w1.weight"):
      both = np.concatenate([a, arrays[name.replace("w1", "w3")]])
      found.setdefault(f"{layer}mlp.experts.gate_up_proj", []).append(both)
    elif rest.endswith("w2.weight"):
      found.setdefault(f"{layer}mlp.experts.down_proj", []).append(a)
  return {name: np.stack(a) if isinstance(a, list) else a for name, a in found.items()}


def test_other_ways_to_hold_the_same_tensors(runs, tmp_path):
  """Experts of a layer in one tensor, several files, an older config, a tied head, tensors of no use."""
  given, fields = tensors(DATA / "mixtral"), config_of("mixtral")
  old = {**fields, "rope_theta": 1e6, "rope_scaling": None}
  del old["rope_parameters"]
  ways = {
      "fused": (fused(given), fields, 10**9),
      "shards": (given | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}, old,
                 20_000),
  }
  expected = arrays(runs("mixtral"), tmp_path / "expected")
  for way, (tensors_of_way, config, max_bytes) in ways.items():
    found = read(str(save(tmp_path / way, tensors_of_way, config, max_bytes)), str(tmp_path / f"{way}_run"))
    assert len(found.ignored) == (way == "shards")
    for key, a in arrays(tmp_path / f"{way}_run", tmp_path / f"{way}_arrays").items():
      np.testing.assert_array_equal(a, expected[key], err_msg=f"{way} {key}")
  assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 3

  tied = changed("mixtral", tmp_path / "tied", {"lm_head.weight": None}, dict(tie_word_embeddings=True))
  read(str(tied), str(tmp_path / "tied_run"))
  found = arrays(tmp_path / "tied_run", tmp_path / "tied_arrays")
  np.testing.assert_array_equal(found["params/head/w"].T, found["params/embedding/table"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_out_as_it_went_in(dtype, tmp_path):
  given = {name: a.astype(jnp.dtype(dtype)) for name, a in tensors(DATA / "deepseek_v3").items()}
  given |= {name: a.astype(np.float32) for name, a in given.items() if name.endswith("correction_bias")}
  read(str(save(tmp_path / "hf", given, config_of("deepseek_v3"))), str(tmp_path / "run"))
  write(str(tmp_path / "run"), str(tmp_path / "out"), "deepseek_v3", dtype=dtype, shard_bytes=10_000)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
  for name, a in tensors(tmp_path / "out").items():
    assert a.dtype == given[name].dtype
    np.testing.assert_array_equal(a, given[name], err_msg=name)


def test_blocks_of_8_bits_have_a_scale_each(tmp_path):
  """A matrix of 130 x 140 has 2 x 2 blocks, of 128 and what is left."""
  rng = np.random.default_rng(0)
  values = rng.standard_normal((130, 140)).astype(jnp.dtype("float8_e4m3fn"))
  scale = np.asarray([[2, 3], [5, 7]], np.float32)
  folder = save(tmp_path / "hf", {"w": values, "w_scale_inv": scale}, {})
  expected = values.astype(np.float32)
  for rows, i in ((slice(0, 128), 0), (slice(128, None), 1)):
    for columns, j in ((slice(0, 128), 0), (slice(128, None), 1)):
      expected[rows, columns] *= scale[i, j]
  read_folder = Folder(str(folder))
  read_folder.scale_by(Rule())
  np.testing.assert_array_equal(read_folder.read("w"), expected)


@pytest.mark.parametrize("layout, key, words", [
    ("olmoe", "attention.qk_norm='none'", "only 'whole'"),
    ("deepseek_v3", "attention.name='multi_head'", "only 'latent'"),
    ("switch_transformers", "name='decoder'", "only 'seq2seq'"),
    ("qwen2_moe", "shared_experts=0", "only '1 or more'"),
])
def test_a_layout_that_cannot_hold_the_model_names_the_key(layout, key, words, runs, tmp_path):
  line = f"--layout={layout} cannot hold model.{key}, {words}; choose (another|--layout=)"
  with pytest.raises(UserError, match=line):
    write(str(runs("mixtral")), str(tmp_path / "out"), layout)
  assert not (tmp_path / "out").exists()


TRAINED = dict(model__tied_head=False, model__moe_every=1, model__num_experts=4, model__router__k=2,
               model__router__gate="renormalized", model__attention__num_kv_heads=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(work directory, state) of a run on a mesh, as `train` saves it; the tokenizer's words are the data's."""
  workdir = str(tmp_path_factory.mktemp("trained"))
  keys = TRAINED | dict(model__num_heads=4, model__attention__num_kv_heads=2, mesh__fsdp=True)
  config = tiny_config(**keys)
  tokenizer = make_tokenizer("sentencepiece:300", documents())
  model, mesh = build(config, tokenizer.vocab_size), partitioning.make_mesh(2, 2, 2)
  optimizer = make_optimizer(config, model.axes)
  with partitioning.use(mesh):
    state = make_state(model, optimizer, 0, abstract_state(model, optimizer, mesh, True))
  wd.keep(workdir, config, tokenizer)
  with Checkpoints(wd.checkpoints(workdir), 1) as checkpoints:
    checkpoints.save(state, {"data_fingerprint": ""})
  return workdir, state


def test_a_trained_run_comes_back_with_its_logits_and_words(trained, tmp_path, capsys):
  """Its checkpoint is written otherwise than that of a converted one, and holds an optimizer's state."""
  workdir, state = trained
  assert cli.main(["convert", f"--workdir={workdir}", f"--to={tmp_path / 'hf'}", "--layout=mixtral"]) == 0
  assert "at step 0 is written to" in capsys.readouterr().out
  assert cli.main(["convert", f"--from={tmp_path / 'hf'}", f"--workdir={tmp_path / 'back'}"]) == 0
  assert f"tokenizer {tmp_path / 'hf' / 'spiece.model'}" in capsys.readouterr().out
  ids = np.arange(64, dtype=np.int32).reshape(2, 32)
  batch = {"decoder_inputs": ids, "segments": np.ones_like(ids), "positions": ids % 32}
  logits = []
  for run in map(load, (workdir, str(tmp_path / "back"))):
    assert run.tokenizer.fingerprint == wd.read_tokenizer(workdir, run.config).fingerprint
    for name, a in names.by_path(jax.device_get(state.params)).items():
      np.testing.assert_array_equal(names.by_path(jax.device_get(run.params))[name], a)
    model = build(run.config, run.tokenizer.vocab_size, "dropless")
    logits.append(jit(model.apply)(run.params, run.buffers, batch)[0])
  np.testing.assert_array_equal(*logits)
  assert logits[0].std() > 0.01


@pytest.mark.parametrize("layout, keys, words", [
    ("mixtral", {}, r"model.moe_layers=\(1,\), only \(0, 1\)"),
    ("mixtral", dict(model__num_experts=0), "model.num_experts=0, only 'a sparse model'"),
    ("mixtral", TRAINED | dict(model__router__gate="raw"), "model.router.gate='raw', only 'renormalized'"),
    ("mixtral", TRAINED | dict(model__extra_ffn=True), "model.extra_ffn=True, only False"),
    ("mixtral", TRAINED | dict(given__router="Mine"), "model.router.name='an instance of Mine', only 'top_k"),
    ("mixtral", dict(model__name="vit"), "model.name='vit', only 'decoder'"),
    ("switch_transformers", dict(model__name="seq2seq", model__moe_layers=(0,), model__activation="relu"),
     r"model.moe_layers=\(0,\), only \(1,\)"),
])
def test_a_run_of_another_architecture_names_the_key(layout, keys, words, tmp_path):
  """Told from its config: no checkpoint is opened, and nothing is left behind."""
  wd.keep(str(tmp_path), tiny_config(**keys), make_tokenizer("bytes"))
  line = f"--layout={layout} cannot hold {words}'?; (choose another layout of|no layout holds such)"
  with pytest.raises(UserError, match=line):
    write(str(tmp_path), str(tmp_path / "out"), layout)
  assert not (tmp_path / "out").exists()


def test_what_the_machine_runs_on_is_no_part_of_a_layout():
  """Neither the dispatch nor the backend changes an output, so the run is written as without them."""
  keys = dict(model__backend="ragged_dot", model__dispatch="scatter", mesh__data=2)
  plain, other = (foreign_config(get_layout("mixtral", ""), tiny_config(**TRAINED | more),
                                 make_tokenizer("bytes"), "float32") for more in ({}, keys))
  assert plain == other


def test_a_step_that_is_not_there_leaves_nothing_behind(trained, tmp_path):
  with pytest.raises(UserError, match="has no step 7; choose from 0"):
    write(str(trained[0]), str(tmp_path / "out"), "mixtral", step=7)
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_stays_near_the_largest_tensor(tmp_path):
  """Of 756 MiB in float32 the largest tensor has 32; all at once would take 24 times as much.

  What remains is a few tensors, chunks of the save, and what threads keep for the next: it does not grow with
  the number of layers.
  """
  script = pathlib.Path(__file__).parent / "measure_memory.py"
  done = subprocess.run([sys.executable, script, tmp_path / "files", "--layers=2"], capture_output=True,
                        text=True, check=True, env={**os.environ, "PYTHONPATH": str(script.parents[2])})
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["all"] > 700 and found["largest"] == 32
  assert max(found["read"], found["write"]) < 8 * found["largest"]


def test_a_full_disk_leaves_nothing_of_either_way(trained, tmp_path, capsys, monkeypatch):
  """The array files' room, a tensor in the middle, and orbax, which says it in its own way."""
  def full(*args):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

  written = lambda path, mode: full() if "w" in mode else open(path, mode)  # noqa: SIM115
  to = ["convert", f"--workdir={trained[0]}", f"--to={tmp_path / 'hf'}", "--layout=mixtral"]
  back = ["convert", f"--from={DATA / 'mixtral'}", f"--workdir={tmp_path / 'back'}"]
  for argv, folder, spoil in (
      (to, "hf", full_disk.fill), (back, "back", full_disk.fill),
      (to, "hf", lambda patch: patch.setattr(storage.local, "open", written, raising=False)),
      (back, "back", lambda patch: patch.setattr("sparse_experts.convert.read.save_mapped", full))):
    with monkeypatch.context() as patch:
      spoil(patch)
      assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: no space left on the disk of {tmp_path / folder}") and err.count("\n") == 1
    assert "damaged" not in err and not [*(tmp_path / folder).rglob("*")]


def test_the_verb_makes_a_run_that_others_start_from(tmp_path, capsys):
  """convert, sample by ids, and a run of the same model that takes the weights."""
  run = str(tmp_path / "run")
  assert cli.main(["convert", f"--from={DATA / 'mixtral'}", f"--workdir={run}",
                   "--config.train.steps=1"]) == 0
  told = capsys.readouterr().out
  assert "mixtral: 14,032 parameters" in told and "prompts and answers are token ids" in told
  assert cli.main(["sample", f"--workdir={run}", "--prompt=5 6 7", "--length=3", "--temperature=0"]) == 0
  ids = [int(word) for word in capsys.readouterr().out.split()]
  assert ids[:3] == [5, 6, 7] and len(ids) == 6 and max(ids) < 96
  config = read_config(run)
  config.unlock().init_from = run
  tokenizer = wd.read_tokenizer(run, config)
  model = build(config, tokenizer.vocab_size)
  mesh = partitioning.make_mesh()
  given = init_from.read(config, abstract_state(model, optax.identity(), mesh, False), model.axes, tokenizer)
  assert len(given.moved) == len(given.arrays) == len(arrays(run, tmp_path / "arrays"))
  assert cli.main(["convert", f"--from={DATA / 'mixtral'}", f"--workdir={run}"]) == 2
  assert "holds a run; name another folder" in capsys.readouterr().err


def test_folders_may_have_any_name(tmp_path):
  """tensorstore's file driver turns a backslash into a slash, orbax takes brackets for a pattern."""
  odd = tmp_path / "m[x=1] *?\\%20#é"
  changed("mixtral", odd, config=dict(max_position_embeddings=4096))
  read(str(odd), str(odd / "run"))
  assert write(str(odd / "run"), str(odd / "back"), "mixtral") == 0
  back = tensors(odd / "back")
  assert all(np.array_equal(back[name], array) for name, array in tensors(odd).items())
  assert [path.name for path in tmp_path.iterdir()] == [odd.name]
  # The model's own limit, not that of the rows that would be trained on.
  there = json.loads((odd / "back/config.json").read_text())
  assert read_config(str(odd / "run")).model.context_length == 4096 == there["max_position_embeddings"]
