"""The package as others get it: from a wheel and editable, in a folder that is not the repository.

Nothing is fetched: the packages of this environment serve both installations.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "sparse_experts", "configs")
TINY = [f"--config.{key}" for key in (
    "model.num_layers=2 model.embed_dim=16 model.num_heads=2 model.head_dim=8 model.mlp_dim=32 "
    "model.expert_dim=32 model.group_size=32 data.length=32 train.batch_size=4 train.steps=2 "
    "train.log_every=1 eval.batch_size=8 eval.train_windows=8 eval.min_bytes=1000").split()]


def pip(*argv):
  run = subprocess.run([sys.executable, "-m", "pip", *argv], capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A copy of what is built: building writes into its folder."""
  folder = tmp_path_factory.mktemp("source")
  for name in SOURCES:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, folder / name)
  for cache in folder.rglob("__pycache__"):
    shutil.rmtree(cache)
  return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
  dist = tmp_path_factory.mktemp("dist")
  pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", dist, source)
  (path,) = dist.glob("sparse_experts-*.whl")
  return path


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, source, wheel, tmp_path_factory):
  """(how, a function that runs `python ...` there, in an empty folder, and returns what it printed)."""
  folder = tmp_path_factory.mktemp(request.param)
  venv.create(folder / "env")
  python = folder / "env/bin/python"
  (packages,) = (folder / "env/lib").glob("python*/site-packages")
  here = [path for path in sys.path if path.endswith("site-packages")]
  (packages / "environment.pth").write_text("".join(f"{path}\n" for path in here))
  what = [wheel] if request.param == "wheel" else ["--no-build-isolation", "-e", source]
  pip("--python", python, "install", "--no-deps", "--no-index", *what)
  (folder / "elsewhere").mkdir()
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
      "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(source / "cache")}

  def run(*argv, code=0):
    done = subprocess.run([python, *argv], cwd=folder / "elsewhere", env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout

  return request.param, run


@pytest.mark.slow
def test_the_wheel_has_every_file(source, wheel):
  """Configs and what is no Python file too."""
  files = {str(path.relative_to(source)) for path in (source / "sparse_experts").rglob("*") if path.is_file()}
  files |= {f"sparse_experts/{path.relative_to(source)}" for path in (source / "configs").rglob("*.py")}
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  assert len(files) > 200 and files == {name for name in names if ".dist-info/" not in name}


@pytest.mark.slow
def test_it_works_elsewhere(installed, source):
  how, run = installed
  where = run("-c", "import sparse_experts; print(sparse_experts.__file__)").strip()
  assert pathlib.Path(where).is_relative_to(source) == (how == "editable")
  assert run("-m", "sparse_experts", "--version").startswith("sparse_experts ")
  smoke = run("-m", "sparse_experts", "describe", "--config=smoke.py", "--json").splitlines()[-1]
  assert json.loads(smoke)["layers"][1]["experts"] == 8
  dense = run("-m", "sparse_experts", "describe", "--config=configs/switch/tiny.py:dense")
  assert dense.startswith("seq2seq, ") and "sparse" not in dense
  wrong = run("-m", "sparse_experts", "describe", "--config=switch/tyni.py", code=2)
  assert wrong == "error: --config=switch/tyni.py: no file switch/tyni.py; did you mean 'switch/tiny.py'?\n"
  run("-m", "sparse_experts", "train", "--config=smoke.py", "--workdir=run", *TINY)
  steps = "import json; print(*[json.loads(line)['step'] for line in open('run/metrics.jsonl')])"
  assert run("-c", steps) == "1 2 2\n"
