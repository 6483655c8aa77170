"""Makes the notebooks of this folder from their sources, NAME.py in py:percent format.

    python colab/build.py              every NAME.ipynb, without outputs
    python colab/build.py --execute    docs/notebooks/NAME.ipynb too, run from top to bottom; minutes

Badges and the cell that installs on Colab are made from the public address in setup.py; while that is empty
there are none. Needs the extra [colab].
"""

import argparse
import ast
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time

import jupytext
import nbformat

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
EXECUTED = ROOT / "docs/notebooks"
SECONDS = 600  # that one cell may take on a busy machine
METADATA = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"}}
INSTALL = """\
import sys

if "google.colab" in sys.modules:
  !git clone --quiet --depth=1 {url} /content/sparse_experts
  %pip install --quiet /content/sparse_experts
  %cd /content/sparse_experts/colab"""


def sources() -> list[pathlib.Path]:
  """NAME.py of every notebook, in the order of names."""
  return sorted(path for path in HERE.glob("*.py") if path.stem != "build")


def public_address() -> str:
  """`URL` of setup.py."""
  text = (ROOT / "setup.py").read_text(encoding="utf-8")
  return ast.literal_eval(re.search(r"^URL = (.*)$", text, re.MULTILINE)[1])


def make(source: pathlib.Path, url: str = "") -> nbformat.NotebookNode:
  """The notebook of a source, without outputs; with a public address also its badge and install cell."""
  cells = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent").cells
  if url:
    link = f"{url.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main/colab"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link}/"
    cells[0].source = f"{badge}{source.stem}.ipynb)\n\n{cells[0].source}"
    cells.insert(1, nbformat.v4.new_code_cell(INSTALL.format(url=url)))
  for i, cell in enumerate(cells):
    cell.metadata, cell.id = nbformat.NotebookNode(), f"{source.stem}-{i}"  # nothing that a rerun changes
  return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def text_of(notebook: nbformat.NotebookNode) -> str:
  """What a notebook's file holds."""
  return nbformat.writes(notebook, indent=1) + "\n"


def execute(notebook: nbformat.NotebookNode, folder: str) -> float:
  """Runs a notebook in a kernel of this Python and an empty folder; its outputs are then in it.

  Returns seconds. Files next to the sources are there as next to the notebook. Raises nbclient's
  CellExecutionError if a cell does.
  """
  from jupyter_client import AsyncKernelManager
  from nbclient import NotebookClient

  for path in HERE.glob("*.json"):
    shutil.copy(path, folder)
  manager = AsyncKernelManager()
  manager.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR",
                              "-f", "{connection_file}"]
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  start = time.perf_counter()
  client = NotebookClient(notebook, km=manager, timeout=SECONDS, startup_timeout=SECONDS, record_timing=False,
                          coalesce_streams=True, resources={"metadata": {"path": folder}})
  client.owns_km = True  # so it ends the kernel
  client.execute(env=os.environ | {"PYTHONPATH": path})
  return time.perf_counter() - start


def without_frames(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """The notebook as a page: a frame shows a file of the run, which is not next to the page."""
  is_frame = lambda output: "<iframe" in output.get("data", {}).get("text/html", "")
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = [output for output in cell.outputs if not is_frame(output)]
  return notebook


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("names", metavar="NAME", nargs="*", help="notebooks to make; default: all")
  parser.add_argument("--execute", action="store_true", help="also run them")
  args = parser.parse_args()
  for source in sources():
    if args.names and source.stem not in args.names:
      continue
    notebook = make(source, public_address())
    source.with_suffix(".ipynb").write_text(text_of(notebook), encoding="utf-8")
    if args.execute:
      notebook = make(source)
      before = os.times()
      with tempfile.TemporaryDirectory() as folder:
        seconds = execute(notebook, folder)
      after = os.times()
      cpu = sum(after[2:4]) - sum(before[2:4])  # of kernels, which are children
      target = EXECUTED / f"{source.stem}.ipynb"
      target.write_text(text_of(without_frames(notebook)), encoding="utf-8")
      print(f"{target.relative_to(ROOT)}: {seconds:.0f} s, {cpu:.0f} s of CPU, "
            f"{target.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
  main()
