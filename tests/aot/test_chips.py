"""Slices of TPUs: what their names mean, and how far their chips are apart."""

import importlib.util
from types import SimpleNamespace

import pytest

from sparse_experts.aot import chips
from sparse_experts.errors import UserError


@pytest.mark.parametrize("topology, words", [
    ("v5x:2x2", "chip 'v5x' is unknown; did you mean 'v5p'?"),
    ("v5p:4x4", "a slice of v5p has 3 edges; write for example v5p:4x4x4"),
    ("v5e:0x4", "a slice of v5e has 2 edges"),
    ("v5e:ax4", "a slice of v5e has 2 edges"),
])
def test_mistakes(topology, words):
  with pytest.raises(UserError, match=words.replace("?", r"\?")) as e:
    chips.parse(topology)
  assert "\n" not in str(e.value)


def test_names():
  assert chips.parse("tpu7x:4x4x8") == ("tpu7x", (4, 4, 8))
  assert chips.parse("v5e") == ("v5e", ())
  for name, chip in chips.CHIPS.items():
    assert all(len(chips.parse(t)[1]) == chip.dimensions for t in chips.slices(name))
    assert chip.usable_gib <= chip.hbm_gib * 1.01  # v5p: 95 in print, 95.73 by the compiler


def test_without_a_compiler_for_tpus(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"needs libtpu; pip install '.\[aot\]'"):
    chips.get_slice("v5e:2x2")


def devices(*edges):
  at = [(x, y, z) for z in range(edges[2]) for y in range(edges[1]) for x in range(edges[0])]
  return [SimpleNamespace(coords=place) for place in at]


def test_hops_by_hand():
  """Rings are closed where the slice's edge is long enough; of equal places each counts once."""
  line = chips.Slice("v5e:1x2", chips.CHIPS["v5e"], (2, 4), devices(2, 4, 1))
  assert line.hops(line.devices[:2]) == 1
  assert line.hops([d for d in line.devices if d.coords[0] == 0]) == pytest.approx((3 * 1 + 2 * 2 + 3) / 6)
  cube = chips.Slice("v5p:4x4x4", chips.CHIPS["v5p"], (4, 4, 4), devices(4, 4, 4))
  # On a ring of 4 the others are 1, 1 and 2 away: 3 x 4/4 over three edges, itself included.
  assert cube.hops(cube.devices) == pytest.approx(3 * 64 / 63)
