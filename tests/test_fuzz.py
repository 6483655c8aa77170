"""Random damage: a command ends with the same numbers or with one line, never with others or a traceback.

What hypothesis found is a plain test next to the code it is about.
"""

import contextlib
import functools
import io
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, currently_in_test_context, given, note, settings
from hypothesis import strategies as st

from sparse_experts import cli
from sparse_experts.config import to_json
from sparse_experts.training import evaluate
from sparse_experts.training import run as runs
from tests import damage as dm
from tests.texts import functions, write_texts

CONFIG = """
from tests.training.tiny import tiny_config

def get_config():
  return tiny_config(data__source={source!r}, data__valid_share=0.3, train__steps=2,
                     train__checkpoint_every=1, eval__min_bytes=100)
"""
FOREIGN = pathlib.Path(__file__).parent / "convert/data"
ROOT = pathlib.Path(__file__).parents[1]
LONGEST = 60  # seconds that a command may take


def fuzz(examples):
  """The same examples each time, and nothing written about them."""
  return settings(max_examples=examples, derandomize=True, database=None, deadline=None,
                  phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck))


# One run, whose programs are compiled once


class Shared(evaluate.Evaluator):
  """Compiled once for all runs of the same config."""

  programs: ClassVar[dict] = {}

  def __init__(self, model, *args):
    super().__init__(model, *args)
    self._sums = self.programs.setdefault((id(model), self._rows), self._sums)


def shared(f, key):
  """f, called once for all arguments of the same `key`."""
  made = {}

  @functools.wraps(f)
  def call(*args, **kwargs):
    its = key(*args, **kwargs)
    if its not in made:
      made[its] = f(*args, **kwargs), args  # arguments stay, and so do their ids
    return made[its][0]

  return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A folder with `run`, of two steps with a checkpoint of each; programs of one config are compiled once."""
  root = tmp_path_factory.mktemp("fuzz")
  write_texts(root / "text", functions())
  (root / "tiny.py").write_text(CONFIG.format(source=f"files:{root}/text"))
  of_config = lambda config, *args, **kwargs: (to_json(config), repr(args), repr(kwargs))
  of_model = lambda model, *args: (id(model), str(args[1:]))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs, "build", shared(runs.build, of_config))
    patch.setattr(runs, "eval_model", shared(runs.eval_model, of_config))
    patch.setattr(runs, "abstract_state", shared(runs.abstract_state, of_model))
    patch.setattr(evaluate, "Evaluator", Shared)
    assert cli.main(["train", f"--config={root}/tiny.py", f"--workdir={root}/run"]) == 0
    yield root


# The rule


def in_process(*argv):
  """(exit code, what was printed, messages)."""
  out, err = io.StringIO(), io.StringIO()
  before = signal.signal(signal.SIGALRM, _too_long)
  signal.alarm(LONGEST)
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = cli.main(list(map(str, argv)))
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
  return code, out.getvalue(), err.getvalue()


def _too_long(*_):
  raise AssertionError(f"the command does not end within {LONGEST} seconds")


def in_a_process_of_its_own(*argv):
  done = subprocess.run([sys.executable, "-m", "sparse_experts", *map(str, argv)], cwd=ROOT, text=True,
                        capture_output=True, timeout=4 * LONGEST, check=False)
  return done.returncode, done.stdout, done.stderr


def answer(start, *argv):
  """What a command printed if its work was done; None after one line that says why it was not."""
  code, out, err = start(*argv)
  if currently_in_test_context():  # fixtures are not
    note(f"{argv[0]}: {code}\n{out}{err}")
  assert code in (0, 2) and "Traceback" not in out + err
  errors = [line for line in err.splitlines() if line.startswith("error: ")]
  assert len(errors) == (code == 2)
  if code == 2:
    assert err.endswith(errors[0] + "\n") and len(errors[0]) < 5000
  return out if code == 0 else None


def figures(workdir, *flags, start=in_process):
  """What `evaluate` says of a run, or None."""
  out = answer(start, "evaluate", "--quick", "--json", f"--workdir={workdir}", *flags)
  return None if out is None else json.loads(out.splitlines()[-1])


def same(a, b):
  """Figures: another mesh or dispatch, which config.json may be given, adds up in another order."""
  near = lambda x, y: math.isclose(x, y, rel_tol=1e-5) if isinstance(y, float) else x == y
  return a.keys() == b.keys() and all(near(a[name], b[name]) for name in b)


@pytest.fixture(scope="module")
def expected(tiny):
  """{step: the figures of the undamaged run}."""
  return {step: figures(tiny / "run", f"--step={step}") for step in (1, 2)}


def damaged(original, folder, damages):
  """A copy of a folder with that damage."""
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(original, folder, copy_function=os.link)
  for damage in damages:
    note(dm.apply(damage, folder))
  return folder


# Runs


READERS = st.sampled_from(["evaluate", "evaluate", "evaluate", "compare", "report"])


def check_reader(tiny, expected, verb, damages):
  workdir = damaged(tiny / "run", tiny / "damaged", damages)
  if verb == "compare":
    answer(in_process, verb, workdir, workdir)
  elif verb == "report":
    answer(in_process, verb, f"--workdir={workdir}", "--no-model", f"--out={tiny}/page.html")
  elif (found := figures(workdir)) is not None:
    assert same(found, expected[found["step"]])


@fuzz(60)
@given(READERS, dm.damages())
def test_damage_of_a_run(tiny, expected, verb, damages):
  check_reader(tiny, expected, verb, damages)


@pytest.mark.slow
@fuzz(3750)
@given(READERS, dm.damages())
def test_much_damage_of_a_run(tiny, expected, verb, damages):
  check_reader(tiny, expected, verb, damages)


@pytest.mark.slow
@fuzz(30)
@given(st.sampled_from(["evaluate", "train"]), dm.damages())
def test_damage_of_a_run_in_processes_of_their_own(tiny, expected, verb, damages):
  """A training that goes on with what is left ends with the figures of the undamaged one."""
  workdir = damaged(tiny / "run", tiny / "damaged", damages)
  own = in_a_process_of_its_own
  if verb == "train" and answer(own, verb, f"--config={tiny}/tiny.py", f"--workdir={workdir}") is None:
    return
  found = figures(workdir, start=own)
  assert found is not None or verb == "evaluate"
  if found is not None:
    assert same(found, expected[2 if verb == "train" else found["step"]])


# Checkpoints of strangers


@pytest.fixture(scope="module")
def originals(tiny):
  """{name: (folder, its tensors, what is converted of it)}."""
  found = {}
  for name in ("mixtral", "deepseek_v3", "switch"):
    folder = tiny / name
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
      shutil.copy(FOREIGN / name / file, folder)
    found[name] = folder, tensors(folder), converted(tiny, folder)
  return found


def tensors(folder):
  return (folder / "model.safetensors").read_bytes()


def converted(tiny, folder):
  """Shapes, types and checksums of the arrays that `convert` makes of a checkpoint, or None."""
  shutil.rmtree(tiny / "converted", ignore_errors=True)
  done = answer(in_process, "convert", f"--from={folder}", f"--workdir={tiny}/converted")
  return done and json.loads((tiny / "converted/checkpoints/0/meta/metadata").read_text())["arrays"]


def check_convert(tiny, originals, name, damages):
  """The format has no checksum, so other bytes of the tensors are other tensors."""
  original, content, arrays = originals[name]
  folder = damaged(original, tiny / "foreign", damages)
  found = converted(tiny, folder)
  if found is not None and tensors(folder) == content:
    assert found == arrays


@fuzz(50)
@given(st.sampled_from(["mixtral", "deepseek_v3", "switch"]), dm.damages())
def test_damage_of_a_foreign_checkpoint(tiny, originals, name, damages):
  check_convert(tiny, originals, name, damages)


@pytest.mark.slow
@fuzz(1250)
@given(st.sampled_from(["mixtral", "deepseek_v3", "switch"]), dm.damages())
def test_much_damage_of_foreign_checkpoints(tiny, originals, name, damages):
  check_convert(tiny, originals, name, damages)
