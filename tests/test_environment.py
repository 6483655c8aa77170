"""Variables of jax and XLA that cannot work are named in one line, before or after jax tripped over them."""

import os
import pathlib
import subprocess
import sys

import pytest

from sparse_experts import environment
from sparse_experts.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("name, value, message", [
    ("JAX_ENABLE_X64", "1", "runs compute and save in 32 bits"),
    ("JAX_ENABLE_X64", "True", "runs compute and save in 32 bits"),
    ("JAX_DISABLE_JIT", "yes", "compiled ahead"),
    ("JAX_NUMPY_DTYPE_PROMOTION", "strict", "optax needs the standard promotion"),
    ("JAX_TRANSFER_GUARD", "disallow", "copied between host and devices"),
    ("JAX_NUM_CPU_DEVICES", "0", "is no number of devices"),
    ("JAX_NUM_CPU_DEVICES", "eight", "is no number of devices"),
    ("JAX_PLATFORMS", "tpu", "this machine has no TPU"),
    ("JAX_PLATFORMS", "cuda,cpu", "jax has no plugin for such devices here"),
])
def test_a_value_that_cannot_work_is_refused(name, value, message, monkeypatch):
  monkeypatch.setattr(environment, "_has_plugins", lambda: False)
  with pytest.raises(UserError, match=f"^{name}={value}.*{message}.*unset"):
    environment.prepare({name: value}, tpu=False)


@pytest.mark.parametrize("environ", [
    {}, {"JAX_ENABLE_X64": "0"}, {"JAX_NUMPY_DTYPE_PROMOTION": "standard"}, {"JAX_NUM_CPU_DEVICES": "8"},
    {"JAX_PLATFORMS": "cpu"}, {"JAX_PLATFORMS": "tpu,cpu"}, {"JAX_TRANSFER_GUARD": "log"}])
def test_other_values_pass_as_they_are(environ):
  before = dict(environ)
  environment.prepare(environ, tpu=True)
  assert environ == before


def test_libtpu_without_a_tpu_is_left_alone(monkeypatch):
  monkeypatch.setattr(environment, "_has_plugins", lambda: False)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
  environ = {}
  environment.prepare(environ, tpu=False)
  assert environ == {"JAX_PLATFORMS": "cpu"}
  monkeypatch.setattr(environment, "_has_plugins", lambda: True)
  environ = {}
  environment.prepare(environ, tpu=False)
  assert environ == {}  # there may be a GPU


def test_a_host_with_variables_of_a_tpu_may_have_one():
  assert environment.may_have_tpu({"TPU_NAME": "local"})


@pytest.mark.parametrize("environ, said, line", [
    ({"JAX_DEFAULT_PRNG_IMPL": "x"}, 'Invalid value "x" for JAX flag jax_default_prng_impl',
     'JAX_DEFAULT_PRNG_IMPL=x: Invalid value "x" for JAX flag jax_default_prng_impl; choose another value or '
     "unset JAX_DEFAULT_PRNG_IMPL"),
    ({"JAX_PLATFORMS": "nonsense"}, "Unable to initialize backend 'nonsense' (set JAX_PLATFORMS='')",
     "JAX_PLATFORMS=nonsense: Unable to initialize"),
    ({"JAX_PLATFORMS": ""}, "set JAX_PLATFORMS=''", None),
    ({"JAX_DEBUG_NANS": "1"}, "shapes do not match", None),
    ({"HOME": "/root"}, "no HOME", None),
])
def test_an_error_of_jax_is_laid_to_the_variable_that_it_names(environ, said, line):
  found = environment.blame(ValueError(said), environ)
  assert found is None if line is None else found.startswith(line)


def command(*argv, python=(), **environ):
  env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
  return subprocess.run([sys.executable, *python, "-m", "sparse_experts", *argv], cwd=ROOT, env=env | environ,
                        capture_output=True, text=True)


def test_help_is_there_without_docstrings():
  run = command("--help", python=["-OO"])
  assert run.returncode == 0 and "train      Trains a config in a work directory" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    ("--xla_bogus=1", "Unknown flag in XLA_FLAGS: --xla_bogus=1"),
    ("--xla_backend_optimization_level=abc", "Couldn't interpret value abc"),
])
def test_flags_that_abort_xla_are_told_in_one_line(flags, message):
  run = command("describe", "--config=smoke.py", JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
  assert run.returncode == 2 and run.stdout == ""
  (line,) = run.stderr.splitlines()
  assert line.startswith(f"error: XLA_FLAGS={flags}: {message}") and line.endswith("mend or unset XLA_FLAGS")


@pytest.mark.slow
def test_a_terminal_of_ascii_shows_other_letters_escaped():
  run = command("describe", "--routers", JAX_PLATFORMS="cpu", PYTHONIOENCODING="ascii")
  assert run.returncode == 0, run.stderr
  assert "softmax(x W + N(0, 1/E\\xb2))" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("python, environ", [
    (["-O"], {}), (["-OO"], {}), ([], {"PYTHONWARNINGS": "error"}),
    ([], {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ([], {"JAX_NUMPY_RANK_PROMOTION": "raise"}), ([], {"JAX_DEBUG_NANS": "1"})],
    ids=["O", "OO", "warnings", "C locale", "rank", "nans"])
def test_two_steps_are_trained(python, environ, tmp_path):
  (tmp_path / "tiny.py").write_text(
      "from sparse_experts.config import load_config\nfrom tests.shrink import shrink\n"
      "def get_config(arg=None):\n  return shrink(load_config('smoke.py'))\n")
  run = command("train", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'run'}",
                "--config.train.steps=2", python=python, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), **environ)
  assert run.returncode == 0, run.stderr
