"""Notebooks are what their sources say, in git without outputs, and run from top to bottom."""

import ast
import importlib.util
import os
import pathlib
import sys

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("build", ROOT / "colab/build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

SOURCES = build.sources()
each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
URL = "https://github.com/someone/sparse_experts"


def cells(notebook):
  return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_seven():
  assert len(SOURCES) == 7
  notebooks = {path.stem for path in SOURCES}
  assert {path.stem for path in (ROOT / "colab").glob("*.ipynb")} == notebooks
  assert {path.stem for path in build.EXECUTED.glob("*.ipynb")} == notebooks


@each
def test_they_do_not_drift(source):
  """If this fails: python colab/build.py, with --execute for the copy with outputs."""
  text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
  assert text == build.text_of(build.make(source, build.public_address()))
  assert not any(cell.get("outputs") for cell in nbformat.reads(text, as_version=4).cells)

  path = build.EXECUTED / source.with_suffix(".ipynb").name
  executed = nbformat.read(path, as_version=4)
  nbformat.validate(executed)
  assert cells(executed) == cells(build.make(source)), "the copy with outputs is of another source"
  outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
  assert outputs
  assert not [output for output in outputs if output.output_type == "error"]
  assert path.stat().st_size < 400_000
  for place in (str(ROOT), "/tmp/", os.path.expanduser("~/")):
    assert place not in path.read_text(encoding="utf-8"), "an output names a folder of this machine"


@each
def test_they_only_use_the_package(source):
  """What a notebook needs more than once belongs to the package; titles say what the reader can do then."""
  known = {"sparse_experts", "jax", "flax", "optax", "numpy", "IPython", "PIL", "sklearn"}
  tree = ast.parse(source.read_text(encoding="utf-8"))
  names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
  names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
  assert {name.split(".")[0] for name in names} <= known | set(sys.stdlib_module_names)
  notebook = build.make(source)
  assert notebook.cells[0].source.startswith("# ")
  assert all(len(cell.source.splitlines()) <= 32 for cell in notebook.cells)


def test_badge_and_install_cell_need_the_public_address():
  private, public = build.make(SOURCES[0]), build.make(SOURCES[0], URL)
  assert "colab.research.google.com" not in build.text_of(private)
  assert "github/someone/sparse_experts/blob/main/colab/" + SOURCES[0].stem in public.cells[0].source
  assert f"git clone --quiet --depth=1 {URL} " in public.cells[1].source
  assert public.cells[1].source.startswith('import sys\n\nif "google.colab" in sys.modules:\n')
  assert cells(public)[2:] == cells(private)[1:]


@pytest.mark.slow
@each
def test_they_run(source, tmp_path, monkeypatch):
  """From top to bottom in a new folder, as a reader's kernel runs them: not with the flags of these tests."""
  for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  (tmp_path / "work").mkdir()
  build.execute(build.make(source), str(tmp_path / "work"))


@pytest.mark.slow
def test_a_cell_that_fails_is_seen(tmp_path):
  notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")], metadata=build.METADATA)
  with pytest.raises(Exception, match="ZeroDivisionError"):
    build.execute(notebook, str(tmp_path))
