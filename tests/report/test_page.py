"""The page as text: what is escaped, that nothing can be requested, its size, and tables without scripts."""

import base64
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest

from sparse_experts.report import blob, page
from tests.report.made_up import PATCH, make_cards, write_run

EVIL = "</script><script>alert('&\u2028')</script>"
VOID = {"meta", "link", "img", "input", "br"}


class Reader(html.parser.HTMLParser):
  """Tags with their attributes, text by tag, and whether every tag is closed in order."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self._open = [], [], []
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text.append((self._open[-1] if self._open else "", data))

  def of(self, tag):
    return "".join(data for name, data in self.text if name == tag)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(page, its reader) of a run whose config, notes and cards hold text that looks like HTML."""
  folder = write_run(tmp_path_factory.mktemp("run") / "<u>run", keys={"data.source": EVIL})
  cards = make_cards()
  cards["layers"][0]["expert_cards"][0]["tokens"][0]["text"] = EVIL
  cards["layers"][1]["expert_cards"][1]["patches"] = [PATCH]
  cards["layers"][1]["why_missing"] = f"because {EVIL} and `a<b>` & `c"
  text = page.render(blob.make([str(folder)], lambda workdir: cards))
  return text, Reader(text)


def test_text_stays_text(made):
  text, reader = made
  assert len(re.findall(r"<script", text)) == 2 and not re.search(r"<(u>|b>bold|img src=x)", text)
  assert "alert(" in reader.of("code") and EVIL in reader.of("pre") and "<b>bold</b>" in reader.of("span")
  names = {name for _, attributes in reader.tags for name in attributes}
  assert not any(name.startswith("on") or name == "style" for name in names)
  data = json.loads(reader.of("script").partition('"use strict"')[0])
  assert data["title"] == "<u>run" and data["runs"][0]["curves"]["loss"]["mean"][0] > 3
  assert page.escaped([EVIL, "\u2029"]).isascii() and not set(page.escaped([EVIL])) & set("<>&")


def test_code_in_a_sentence_is_escaped_first(made):
  text, _ = made
  assert " and <code>a&lt;b&gt;</code> &amp; `c." in text
  shown = "".join(data for tag, data in made[1].text if tag not in ("script", "style", "pre"))
  assert not re.search(r"`[^`]{1,60}`", shown) and "describe --routers" in made[1].of("code")


def test_nothing_can_be_requested(made):
  text, reader = made
  for tag, attributes in reader.tags:
    assert tag not in ("iframe", "object", "embed", "form", "base", "video", "audio")
    for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
      assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
  code = reader.of("style") + reader.of("script")
  assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", code)
  assert set(re.findall(r"https?://[^\"\s]+", text)) == {"http://www.w3.org/2000/svg"}
  policy = next(a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
  rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
  script = '"use strict"' + reader.of("script").partition('"use strict"')[2]
  for name, inline in (("style-src", reader.of("style")), ("script-src", script)):
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert rules.pop(name) == f"'sha256-{digest}'"
  assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


def test_tables_hold_the_numbers_without_scripts(made):
  reader = made[1]
  cells = reader.of("td") + reader.of("th") + reader.of("dd")
  for number in ("1.9000", "3.174", "decoder/03", "163.8k", "31.0%", "5f2c9d1e", "train.steps"):
    assert number in cells + reader.of("code"), number
  text = made[0]
  assert "by log-likelihood ratio; × lift" in text and "A domain is the first folder of a document" in text
  assert "on this sample; <code>evaluate</code> measures it on all validation records" in text
  assert "dead experts in training" in cells + reader.of("dt")
  labels = [a.get("aria-label", "") for _, a in reader.tags if a.get("class") == "scroll"]
  assert len(labels) == len(set(labels)) > 5 and all(labels)
  ids = [a["id"] for _, a in reader.tags if "id" in a]
  assert len(ids) == len(set(ids))
  assert {a["href"][1:] for tag, a in reader.tags if tag == "a"} <= set(ids)


def test_without_the_model_the_page_says_so(tmp_path):
  folder = write_run(tmp_path / "run", finished=False, steps=900, loads=False)
  text = page.render(blob.make([str(folder)], None))
  for said in ("expert cards, regret, rerouting cost, saturation and the layer table: left out", "not logged",
               "load of each expert over time: not logged", "final figure: written when the run has finished",
               "going on, or stopped, step 500 of 900"):
    assert said in text
  Reader(text)


def test_a_large_page_is_made_smaller(tmp_path):
  """Twelve layers of 64 experts with long examples: below the limit, and it says what was left out."""
  layers = [f"decoder/{i:02d}" for i in range(12)]
  folder = write_run(tmp_path / "run", rows=20, layers=layers, experts=64)
  cards = make_cards(layers, 64)
  noise = np.random.default_rng(0)
  for layer in cards["layers"]:
    for card in layer["expert_cards"]:
      card["patches"] = ["data:image/png;base64," + base64.b64encode(noise.bytes(600)).decode()] * 8
  made = blob.make([str(folder)], lambda workdir: cards)
  text = page.render(made)
  assert len(text.encode()) < page.LIMIT
  assert "Left out: some examples and patches of the expert cards" in text
  assert made["left_out"] == []  # the caller's blob is whole
  Reader(text)
