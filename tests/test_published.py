"""The published models are the published ones: parameters of each config in configs/ against print.

Shapes alone are evaluated: Switch-C's 1.6 trillion parameters need no memory.
"""

import dataclasses
import functools
import pathlib

import pytest

from sparse_experts.cli.describe import describe
from sparse_experts.config import dense_twin, load_config
from sparse_experts.validation import validate

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Row:
  """Billions of parameters and of FLOPs per sequence (512 and 114 tokens), as strings with all their digits.

  computed: what the architecture comes to, worked out by others than this code. printed: the paper's figure,
  None where it prints none; `matches`: ours rounds to it. Where it does not, the config's docstring says so.
  flops: ours to three digits, then printed. Papers do not tell what they count; these are not asserted equal.
  """

  spec: str
  computed: str
  printed: str | None = None
  matches: bool = True
  active: str | None = None  # as printed
  flops: tuple[str, str] | None = None


ROWS = [
    Row("t5/base.py", ".248", "0.2", flops=("142", "124")),
    Row("t5/base.py:tied", ".223", ".223"),
    Row("t5/large.py", ".783", "0.7", matches=False, flops=("489", "425")),
    Row("t5/xxl.py", "11.14", "11", flops=("6960", "6300")),
    Row("moe_base.py", "7.44"),
    Row("switch/base.py", "7.44", "7.4", flops=("142", "124")),
    Row("switch/base.py:released", "7.41", "7"),
    Row("switch/base.py:e16", "1.10", "1.1"),
    Row("switch/base.py:e32", "2.00", "2.0"),
    Row("switch/base.py:e64", "3.82", "3.8"),
    Row("switch/base.py:e256", "14.69", "14.7"),
    Row("switch/large.py", "27.15", "26", matches=False, flops=("491", "425")),
    Row("switch/large.py:released", "26.34", "26"),
    Row("switch/xxl.py", "394.7", "395", flops=("6970", "6300")),
    Row("switch/xxl.py:printed", "201", "395", matches=False),
    Row("switch/c.py", "1571.4", "1571", flops=("1100", "890")),
    Row("st_moe/dense_l.py", ".873", "0.8", matches=False, flops=("549", "645")),
    Row("st_moe/l.py", "4.105", "4.1", flops=("619", "645")),
    Row("st_moe/st_moe_32b.py", "269.1", "269", flops=("22000", "20200")),
    Row("glam/64b64e.py", "1162", "1200", active="96.6"),
    Row("glam/1b7.py", "27.3", "27"),
    Row("glam/1b7.py:e128", "53.1", "53"),
    Row("glam/1b7.py:e256", "104.6", "105"),
]


def rounds_to(value, printed):
  """Whether `value` has the digits of `printed`: 0.248 is 0.2, 1162 is 1200."""
  whole, _, decimals = printed.partition(".")
  digits = len(decimals) if decimals else len(whole.rstrip("0")) - len(whole)
  return round(value, digits) == pytest.approx(float(printed))


@functools.cache
def described(spec):
  """(config, `describe`'s counts, its FLOPs of a sequence in billions)."""
  config = load_config(str(ROOT / "configs" / spec))
  found, vocab_size = describe(config)
  assert vocab_size == (256_000 if "glam" in spec else 32_128)
  tokens = config.data.length + (config.data.target_length or 0)
  return config, found, found["flops_per_token"] * tokens / 1e9


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.spec)
def test_counts(row):
  config, found, flops = described(row.spec)
  validate(config)
  total, active = found["params_total"] / 1e9, found["params_active"] / 1e9
  # 0.1%: the counts of others leave out norms, ST-MoE's biases, or a router here and there.
  assert rounds_to(total, row.computed) or total == pytest.approx(float(row.computed), rel=1e-3)
  if row.printed:
    assert rounds_to(total, row.printed) == row.matches
  if row.active:
    assert rounds_to(active, row.active)
  if row.flops:
    assert float(f"{flops:.3g}") == float(row.flops[0])
  m, sparse = config.model, [layer for layer in found["layers"] if layer["kind"] == "sparse"]
  twin = describe(dense_twin(config))[0]["params_total"]
  own = len(sparse) * (m.num_experts * m.embed_dim + m.multiplicative_bias * (m.router.k or 1) * m.mlp_dim)
  assert found["params_active"] - twin == own  # its experts and a dense FFN are alike


def test_no_published_config_is_left_out():
  files = {str(path.relative_to(ROOT / "configs")) for path in ROOT.glob("configs/**/*.py")}
  families = ("t5", "switch", "moe_base", "st_moe", "glam")
  published = {name for name in files if name.startswith(families) and not name.endswith("tiny.py")}
  assert published == {row.spec.partition(":")[0] for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.spec)
def test_the_page_has_the_same_figures(row):
  """On the line of the config: its parameters to four digits, what its paper prints, and both FLOPs."""
  name, _, variant = row.spec.partition(":")
  page = (ROOT / "docs/reproduce.md").read_text()
  [line] = [line for line in page.splitlines() if f"| `configs/{name}`" in line]
  *_, parameters, printed, flops, _ = (cell.strip() for cell in line.split("|"))
  own = f"{described(row.spec)[1]['params_total'] / 1e9:.4g}"
  assert (f"`:{variant}` {own}" if variant else own) in parameters.split(", ")
  if row.printed:
    assert row.printed in printed.split(", ")
  if row.flops:
    assert flops.split(", ") == list(row.flops)
