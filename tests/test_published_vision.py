"""V-MoE's table: parameters of the config files beside the printed ones, and which layers are sparse."""

import pathlib

import pytest

from sparse_experts.config import load_config
from sparse_experts.models import build, describe

ROOT = pathlib.Path(__file__).parent.parent
# File and variant, millions of parameters as printed (so to half of 0.1M), number of sparse layers.
TABLE = [
    ("s32:vit", 36.5, 0), ("s32", 296.9, 4), ("b16:vit", 100.5, 0), ("b16", 979.0, 6), ("l16:vit", 323.1, 0),
    ("l16", 3446.0, 12), ("h14:vit", 655.8, 0), ("h14:last_5", 2688.6, 5), ("h14", 7160.8, 16)]
# What does not compute to the print: 14,705.1M and 845.8M are printed.
OTHERS = [("v_moe_15b", 14691.1, 24), ("l16:last_2", 843.6, 2)]


@pytest.mark.parametrize("spec, millions, sparse", TABLE + OTHERS)
def test_published_sizes(spec, millions, sparse):
  name, colon, arg = spec.partition(":")
  config = load_config(str(ROOT / f"configs/v_moe/{name}.py{colon}{arg}"))
  classes = config.data.image.classes
  assert classes == 18_291
  assert describe(config, classes)["params_total"] == pytest.approx(millions * 1e6, abs=0.05001e6)
  assert len(build(config, classes).sparse_layers) == sparse


def test_a_token_of_an_image_by_hand():
  """FLOPs of V-MoE-S/32: 49 patches and a class token, two of 32 experts in every second of 8 layers."""
  found = describe(load_config(str(ROOT / "configs/v_moe/s32.py")), 18_291)
  d, f, tokens = 512, 2048, 50
  assert found["flops"]["ffn"] == 2 * 2 * d * f * (4 + 4 * 2)
  assert found["flops"]["attention"] == 8 * (2 * 4 * d * d + 2 * 2 * d * tokens)
  assert found["flops"]["router"] == 4 * 2 * d * 32
  assert found["flops"]["head"] == pytest.approx(2 * (d * d + d * 18_291) / tokens)
  assert found["flops"]["embedding"] == pytest.approx(2 * 32 * 32 * 3 * d * 49 / tokens)
  # Active: all but 30 of 32 experts in four layers.
  assert found["params_total"] - found["params_active"] == 4 * 30 * (2 * d * f + d + f)
