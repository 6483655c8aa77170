"""From the blob to one HTML file: fills the template, escapes, and keeps it below 3 MB."""

import base64
import copy
import hashlib
import json
import pathlib
import re
from typing import Any

import jinja2

from sparse_experts.report import numbers
from sparse_experts.report.layers import FIGURES, MANY

LIMIT = 3_000_000  # bytes of a page
HERE = pathlib.Path(__file__).parent
SCRIPTS = ("scales.js", "figures.js", "page.js")
# What a run's figures do not need: its tables are in the page already.
_TABLES = ("config", "facts", "table", "cards", "tiles", "notes", "not_measured")


def render(blob: dict[str, Any]) -> str:
  """The page; below LIMIT bytes, if need be without some of the cards' examples, and then it says so."""
  page = _fill(blob)
  if len(page.encode()) >= LIMIT:
    blob = copy.deepcopy(blob)
  for what, shrink in _SMALLER:
    if len(page.encode()) < LIMIT:
      break
    for run in blob["runs"]:
      for layer in run.get("layers", ()):
        shrink(layer)
    blob["left_out"].append(f"{what}: the page would be larger than {LIMIT // 1_000_000} MB")
    page = _fill(blob)
  return page


def _fill(blob: dict[str, Any]) -> str:
  script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
  return fill("template.html", blob=blob, data=escaped(_drawn(blob)), script=script,
              script_hash=_hash(script), figures=FIGURES, many=MANY)


def fill(template: str, **values: Any) -> str:
  """A page of a template and the common style; every text of `values` is escaped."""
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
      undefined=jinja2.StrictUndefined)
  environment.filters |= {name: getattr(numbers, name) for name in ("number", "percent", "short")}
  environment.filters["parts"] = _parts
  style = environment.get_template("page.css").render()
  page = environment.get_template(template).render(style=style, style_hash=_hash(style), **values)
  return page.encode("utf-8", "backslashreplace").decode()  # JSON may hold half a letter


def _parts(text: str) -> list[str]:
  """A sentence in parts, of which every second one stood between backticks and is code."""
  return re.split(r"`([^`]+)`", text)


def escaped(value: Any) -> str:
  """JSON that may stand in a script element: no text in it can end the element or start another."""
  text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 is written as an escape
  return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
  """What the Content-Security-Policy lets pass of inline text."""
  return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _drawn(blob: dict[str, Any]) -> dict[str, Any]:
  """The part of the blob that figures are drawn from; the summary is text of the page."""
  def layer(of: dict[str, Any]) -> dict[str, Any]:
    measured = of.get("measured") or {}
    return {k: v for k, v in of.items() if k != "measured"} | {"saturation": measured.get("saturation")}

  def run(of: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in of.items() if k not in _TABLES}
    return kept | {"layers": [layer(one) for one in of.get("layers", ())]}

  return {k: v for k, v in blob.items() if k not in ("runs", "summary")} | {
      "runs": [run(one) for one in blob["runs"]],
      "figures": {name: {"title": title, "unit": unit} for name, (title, unit, _) in FIGURES.items()}}


def _cards_of(layer: dict[str, Any]) -> list[dict[str, Any]]:
  return (layer.get("measured") or {}).get("expert_cards") or []


def _fewer(tokens: int, examples: int, patches: int, rows: int) -> Any:
  def shrink(layer: dict[str, Any]) -> None:
    for card in _cards_of(layer):
      for key, most in (("tokens", tokens), ("examples", examples), ("patches", patches)):
        card[key] = (card.get(key) or [])[:most]
      card["profiles"] = {name: found[:rows] for name, found in (card.get("profiles") or {}).items()}
  return shrink


def _first_cards(most: int) -> Any:
  def shrink(layer: dict[str, Any]) -> None:
    if cards := _cards_of(layer):
      layer["measured"]["expert_cards"] = sorted(
          sorted(cards, key=lambda card: -card["share"])[:most], key=lambda card: card["expert"])
  return shrink


def _coarser(layer: dict[str, Any]) -> None:
  layer["load"] = None


# In this order until the page is small enough.
_SMALLER = (
    ("some examples and patches of the expert cards", _fewer(12, 3, 6, 8)),
    ("most examples and patches of the expert cards", _fewer(8, 1, 2, 5)),
    ("examples and patches of the expert cards", _fewer(6, 0, 0, 3)),
    ("cards of all but the 16 fullest experts of a layer", _first_cards(16)),
    ("cards of all but the 4 fullest experts of a layer", _first_cards(4)),
    ("heat maps of the load", _coarser),
    ("expert cards", _first_cards(0)),
)
