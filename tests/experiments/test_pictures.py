"""The pictures of all experiments, from their stored results: they are drawn, readable and small."""

import pathlib

import pytest
from matplotlib.ticker import FixedLocator
from PIL import Image

from experiments import redraw, sweep_table

ROOT = pathlib.Path(redraw.HERE)


def test_all_pictures_of_the_experiments_can_be_redrawn():
  assert {str(path.relative_to(ROOT)) for path in ROOT.glob("*/*.png")} == {*redraw.PICTURES}
  assert not [path for path in ROOT.rglob("*.py") if "matplotlib" in path.read_text()]
  assert all(f"]({pathlib.Path(name).name})" in (ROOT / name).with_name("README.md").read_text()
             for name in redraw.PICTURES)


@pytest.mark.slow
def test_they_are_drawn_from_what_is_stored(tmp_path, monkeypatch):
  """Labels do not overlap, numbers have a name, files are small; those in the folders are these."""
  drawn, save = {}, redraw.plots.save

  def kept(picture, path):
    drawn[str(pathlib.Path(path).relative_to(tmp_path))] = picture
    save(picture, path)

  monkeypatch.setattr(redraw.plots, "save", kept)
  assert redraw.main([f"--out={tmp_path}"]) == 0
  assert drawn.keys() == redraw.PICTURES.keys()
  for name, picture in drawn.items():
    png = (tmp_path / name).read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) < 150_000
    with Image.open(ROOT / name) as stored:
      assert stored.size == tuple(picture.bbox.size.astype(int))
    assert picture.overlaps() == []
    for axis in (axis for axes in picture.axes for axis in (axes.xaxis, axes.yaxis)):
      numbers = axis.get_majorticklabels() and not isinstance(axis.get_major_locator(), FixedLocator)
      assert axis.get_label_text() or not numbers, f"{name}: an axis does not say what its numbers are"


def test_a_table_is_drawn_as_it_stands():
  rows = sweep_table.read("""
before

| arm    | seeds | diverged | nats per byte | sd     | minus dense | 95% interval       | pairs |
|--------|-------|----------|---------------|--------|-------------|--------------------|-------|
| dense  | 5     | 0        | 1.8511        | 0.0324 |             |                    |       |
| switch | 5     | 0        | 1.9112        | 0.0195 | +0.0601     | +0.0348 to +0.0854 | 5     |

after
""")
  assert list(rows) == ["dense", "switch"]
  final, paired = sweep_table.draw(rows).axes
  assert [list(line.get_xdata()) for line in final.get_lines()[1::3]] == [
      pytest.approx([1.8187, 1.8835]), pytest.approx([1.8917, 1.9307])]
  assert [0.0348, 0.0854] in [list(line.get_xdata()) for line in paired.get_lines()]
  assert paired.get_xlabel() == "minus dense, nats per byte"
