"""A checkpoint is the run's own or is refused, and only what is damaged counts as damage."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from sparse_experts import cli
from sparse_experts.errors import UserError
from sparse_experts.small_files import Damaged, of_the_machine
from sparse_experts.training import identity
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Steps, arrays, meta
from sparse_experts.training.run import load
from tests.training.tiny import tiny_config, tiny_train


@pytest.fixture
def run(whole, tmp_path):
  """A copy of a run of four steps, with checkpoints of steps 2 and 4."""
  shutil.copytree(whole[0], tmp_path / "run")
  return tmp_path / "run"


def edit(path, old, new):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


def reseal(folder, step, **changes):
  """Rewrites what a checkpoint says of itself, as another version or run would have; None removes a field."""
  path = folder / "checkpoints" / str(step) / "meta" / "metadata"
  content = json.loads(path.read_text()) | changes
  content = {name: value for name, value in content.items() if name != "check" and value is not None}
  path.write_text(json.dumps(content | {"check": meta.meta_checksum(content)}))


def swap(run):
  steps = run / "checkpoints"
  for old, new in (("2", "other"), ("4", "2"), ("other", "4")):
    (steps / old).rename(steps / new)


# Steps in the wrong place


MISPLACED = {
    "swapped": (swap, 4, 2),
    "renamed": (lambda run: (run / "checkpoints/4").rename(run / "checkpoints/7"), 7, 4),
    "linked": (lambda run: (run / "checkpoints/11").symlink_to("2"), 11, 2),
    "copied": (lambda run: shutil.copytree(run / "checkpoints/2", run / "checkpoints/5"), 5, 2),
    "impossible": (lambda run: (run / "checkpoints/2").rename(run / f"checkpoints/{10**25}"), 10**25, 2),
}


@pytest.mark.parametrize("how", MISPLACED)
def test_a_step_in_the_place_of_another_is_refused_and_stays(run, how):
  misplace, step, held = MISPLACED[how]
  misplace(run)
  before = sorted(os.listdir(run / "checkpoints"))
  for read in (lambda: load(str(run)), lambda: tiny_train(run)):
    with pytest.raises(UserError, match=rf"checkpoints/{step} holds step {held}: it was renamed or swapped"):
      read()
  assert sorted(os.listdir(run / "checkpoints")) == before


def test_a_step_of_an_older_version_knows_its_number_too(run):
  reseal(run, 4, run=None, tokenizer=None, config=None)
  assert load(str(run)).step == 4
  (run / "checkpoints/4").rename(run / "checkpoints/6")
  with pytest.raises(UserError, match="holds step 4"):
    load(str(run))


@pytest.mark.parametrize("name", ["04", "-1", "٧", "1e3", "4.tmp", "damaged-9"])
def test_what_is_no_step_is_none(run, name):
  (run / "checkpoints" / name).mkdir()
  assert Steps(wd.checkpoints(str(run))).steps() == [2, 4]


def test_links_that_lead_nowhere_and_to_the_same_step(run):
  (run / "checkpoints/8").symlink_to("8")
  (run / "checkpoints/9").symlink_to("gone")
  (run / "checkpoints/4").rename(run / "elsewhere")
  (run / "checkpoints/4").symlink_to(run / "elsewhere")
  assert load(str(run)).step == 4


# Another run


def test_checkpoints_of_another_run_are_refused(run):
  reseal(run, 4, run=identity.new_id())
  for read in (lambda: load(str(run)), lambda: tiny_train(run)):
    with pytest.raises(UserError, match=r"/4 is of another run \(.* in run.json of .*\); remove it"):
      read()
  assert load(str(run), step=2).step == 2


@pytest.mark.parametrize("content", [None, "", "{}", '{"id": 7}', '{"id": "\\ud800"}',
                                     '{"id": "abc", "check": 1}', "\0" * 40])
def test_a_run_without_its_id_takes_that_of_its_checkpoints(run, content, capsys):
  before = identity.read_id(str(run))
  (run / "run.json").unlink()
  if content is not None:
    (run / "run.json").write_text(content)
  assert identity.read_id(str(run)) is None and load(str(run)).step == 4
  tiny_train(run)
  assert identity.read_id(str(run)) == before
  assert ("kept aside as damaged-run.json" in capsys.readouterr().err) == (content is not None)


# Config and tokenizer


@pytest.mark.parametrize("key, old, new", [
    ("model.rope.theta", '"theta": 10000.0', '"theta": 10001.0'),
    ("model.norm_eps", '"norm_eps": 1e-06', '"norm_eps": 1e-05'),
    ("eval.min_bytes", '"min_bytes": 900', '"min_bytes": 901'),
    ("data.valid_share", '"valid_share": 0.08', '"valid_share": 0.18'),
    ("optimizer.b2", '"b2": 0.98', '"b2": 0.88'),
])
def test_an_edited_config_is_refused_by_its_key(run, key, old, new):
  edit(run / "config.json", old, new)
  with pytest.raises(UserError, match=rf"/4 was trained with another config: {key}=.* there and "):
    load(str(run))
  with pytest.raises(UserError, match=rf"holds another config: {key}="):
    tiny_train(run)


def test_a_router_argument_that_was_added_is_refused(run):
  edit(run / "config.json", '"router": {', '"router": {"temperature": 2.0,')
  with pytest.raises(UserError, match="model.router.temperature=None there and 2.0 here"):
    load(str(run))


@pytest.mark.parametrize("old, new", [
    ('"log_every": 1', '"log_every": 7'), ('"dispatch": "ragged"', '"dispatch": "scatter"'),
    ('"steps": 4', '"steps": 9'), ('"keep_checkpoints": 3', '"keep_checkpoints": 1')])
def test_what_a_resume_may_change_may_be_edited(run, old, new):
  edit(run / "config.json", old, new)
  assert load(str(run)).step == 4


def test_keys_that_came_later_are_not_held_against_a_checkpoint(run):
  config = json.loads((run / "config.json").read_text())
  del config["model"]["norm_eps"], config["eval"]["min_bytes"]
  reseal(run, 4, config=json.dumps(config))
  edit(run / "config.json", '"norm_eps": 1e-06', '"norm_eps": 1e-05')
  assert load(str(run)).step == 4


def test_a_checkpoint_with_keys_of_a_newer_version_is_no_damage(run):
  config = json.loads((run / "config.json").read_text())
  config["model"]["invented_later"] = 1
  reseal(run, 4, config=json.dumps(config))
  with pytest.raises(UserError, match="unknown key 'model.invented_later'"):
    tiny_train(run)
  assert Steps(wd.checkpoints(str(run))).steps() == [2, 4]


@pytest.mark.parametrize("content", ["vocabulary:384", "words [1]", "", "byteS", "vocabulary:9999999999999"])
def test_another_tokenizer_is_refused_and_made_anew_by_training(run, content, capsys):
  (run / "tokenizer.model").write_text(content)
  with pytest.raises(UserError, match=r"tokenizer.model is not the tokenizer .*same `train` command again"):
    load(str(run))
  tiny_train(run)
  assert "kept aside as damaged-tokenizer.model" in capsys.readouterr().err
  assert load(str(run)).step == 4 and (run / "damaged-tokenizer.model").read_text() == content


def test_before_a_checkpoint_the_tokenizer_is_made_of_the_data(tmp_path, whole):
  """Nothing says yet whether the file is whole."""
  (tmp_path / "tokenizer.model").write_text("vocabulary:384")
  tokenizer = identity.vocabulary(str(tmp_path), tiny_config(), None, print)
  assert tokenizer.fingerprint == whole[1].tokenizer.fingerprint


def test_a_tokenizer_that_cannot_be_made_again_is_asked_for(run):
  reseal(run, 4, tokenizer="0" * 16)
  with pytest.raises(UserError, match="data.tokenizer=bytes does not make it again; restore the file"):
    tiny_train(run)


def test_every_verb_asks(run, tmp_path, capsys):
  edit(run / "config.json", '"norm_eps": 1e-06', '"norm_eps": 1e-05')
  for command in ([f"evaluate|--workdir={run}"], [f"sample|--workdir={run}|--prompt=x"],
                  [f"trace|--workdir={run}|--out={tmp_path}/x.npz"]):
    assert cli.main(command[0].split("|")) == 2, command
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1, command
    assert "norm_eps" in err, command
  with pytest.raises(UserError, match="model.norm_eps=1e-06 there and 1e-05 here"):
    tiny_train(tmp_path / "new", init_from=str(run))


def test_evaluate_says_when_the_data_are_others(run, tmp_path, capsys):
  other = tmp_path / "texts"
  other.mkdir()
  for i in range(30):
    (other / f"{i}.txt").write_text(f"import something_{i}\nreturn {i}\n" * 9)
  source = f"--config.data.source=files:{other}"
  assert cli.main(["evaluate", f"--workdir={run}", source]) == 0
  assert "is other data than the run was trained on" in capsys.readouterr().out


# Damage, and what is none


def error_of(number):
  return OSError(number, os.strerror(number), "some file")


TRANSIENT = [
    *map(error_of, (errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC,
                    errno.EAGAIN, errno.ETIMEDOUT, errno.EDQUOT, errno.EROFS)),
    MemoryError("no memory"), RuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 8 bytes"),
    RuntimeError("INVALID_ARGUMENT: of a program, not of a file"),
    *map(ValueError, ("RESOURCE_EXHAUSTED: Too many open files", "ABORTED: Stale file handle",
                      "UNKNOWN: Input/output error", "INTERNAL: x", "UNAVAILABLE: x", "CANCELLED: x"))]
DAMAGE = [*map(error_of, (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)),
          *map(ValueError, ("DATA_LOSS: CRC-32C checksum verification failed", "NOT_FOUND: x", "not JSON",
                            "OUT_OF_RANGE: Requested byte range", "FAILED_PRECONDITION: Truncated stream",
                            "INVALID_ARGUMENT: Error decoding"))]


def test_errors_of_the_machine_are_told_from_damage():
  assert all(map(of_the_machine, TRANSIENT)) and not any(map(of_the_machine, DAMAGE))


@pytest.fixture
def failing(monkeypatch):
  """failing(error, times): the first reads of arrays raise that; returns the list of raised errors."""
  monkeypatch.setattr("sparse_experts.small_files.WAITS", (0, 0, 0))
  original, raised = arrays.read_arrays, []

  def start(error, times):
    def read(folder, wanted):
      if len(raised) < times:
        raised.append(error)
        raise error
      return original(folder, wanted)

    monkeypatch.setattr("sparse_experts.training.checkpoints.steps.read_arrays", read)
    return raised

  return start


@pytest.mark.parametrize("error", TRANSIENT[:5] + TRANSIENT[10:12] + TRANSIENT[-5:], ids=repr)
def test_an_error_that_lasts_is_told_and_nothing_is_moved(run, failing, error):
  raised = failing(error, 10**6)
  message = r"checkpoint .*/4 cannot be read \(.*\), tried 4 times; nothing was moved"
  with pytest.raises(UserError, match=message) as e:
    tiny_train(run)
  assert len(raised) == 4 and not isinstance(e.value, Damaged)
  assert sorted(os.listdir(run / "checkpoints")) == ["2", "4"]


def test_an_error_that_passes_costs_nothing(run, whole, failing):
  raised = failing(error_of(errno.ESTALE), 3)
  found = load(str(run))
  assert len(raised) == 3 and found.step == 4
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.params), jax.device_get(whole[1].params))


def test_too_many_open_files_while_reading_a_small_file(run, monkeypatch):
  monkeypatch.setattr("sparse_experts.small_files.WAITS", (0,))
  stat = os.stat
  broken = ("config.json", "tokenizer.model", "metadata")
  for name in broken:
    def refuse(path, *args, name=name, **kwargs):
      if os.path.basename(os.fspath(path)) == name:
        raise error_of(errno.EMFILE)
      return stat(path, *args, **kwargs)

    monkeypatch.setattr("sparse_experts.small_files.os.stat", refuse)
    with pytest.raises(UserError, match=rf"{name} cannot be read \(Too many open files\)"):
      load(str(run))
  monkeypatch.undo()
  assert not list(run.rglob("damaged-*"))


def test_arrays_of_another_type_are_no_damage(run):
  """As with JAX_ENABLE_X64, which makes some of the state 64 bits wide."""
  steps = Steps(wd.checkpoints(str(run)))
  wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float64"), {"params": steps.tree(4)["params"]})
  with pytest.raises(UserError, match="arrays of other types: .* is float32 there and float64 here") as e:
    steps.refuse_others(wide, 4)
  assert not isinstance(e.value, Damaged)


@pytest.mark.parametrize("name", ["state/_METADATA", "state/_sharding", "_CHECKPOINT_METADATA",
                                  "state/array_metadatas/process_0", "commit_success.txt"])
@pytest.mark.parametrize("content", [b"", b"7", b"\xff\xfe\0"])
def test_files_that_are_not_needed_do_no_harm(run, name, content):
  path = run / "checkpoints/4" / name
  if not path.exists():
    pytest.skip("this version of orbax writes none")
  path.write_bytes(content)
  assert load(str(run)).step == 4
  tiny_train(run)
  assert not list(run.rglob("damaged-*"))
