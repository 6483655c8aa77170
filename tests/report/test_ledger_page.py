"""The page of the ledger: each claim with its verdict, picture and figures; no script, nothing unescaped."""

import html.parser
import os

import pytest

from sparse_experts import cli
from sparse_experts.ledger import claim_file, run
from sparse_experts.report import ledger
from tests.ledger.test_claims import LOSSES, PAIRED, PUBLISHED, changed, two_figures, write

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")


class Texts(html.parser.HTMLParser):
  """Tags and texts of a page, with the sizes of its bars."""

  def __init__(self):
    super().__init__()
    self.tags, self.texts, self.lines = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag == "line" and dict(attrs)["class"] == "interval":
      self.lines.append(tuple(float(dict(attrs)[at]) for at in ("x1", "x2")))

  def handle_data(self, data):
    self.texts.append(data)


@pytest.fixture
def claims(tmp_path):
  """One shown, one of published numbers with a name that looks like HTML, one that was not run."""
  write(tmp_path, "paper/shown", PAIRED)
  write(tmp_path, "paper/waits", PAIRED)
  write(tmp_path, "other/printed", changed(PUBLISHED, "statement", "<script>alert(1)</script> & more"))
  found = claim_file.ledger(str(tmp_path))
  shown, printed = found["paper/shown"], found["other/printed"]
  about = {"scale": "cpu", "minutes": 3}
  claim_file.append(shown, about | {"figures": LOSSES} | run.judged(shown, LOSSES, None))
  claim_file.append(printed, about | run.published(printed, two_figures("", False)))
  return tmp_path


def test_the_page_has_every_claim_and_figure(claims, tmp_path, capsys):
  out = tmp_path / "page.html"
  assert cli.main(["report", f"--ledger={claims}", f"--out={out}"]) == 0
  assert "3 claims" in capsys.readouterr().out
  page = Texts()
  page.feed(text := out.read_text())
  said = " ".join(" ".join(page.texts).split())
  assert "script" not in page.tags and "<script>alert(1)</script> & more" in said
  assert "3 claims, 2 tested: 2 shown." in said and "not run" in said
  assert "-0.098 (-0.09996 to -0.09604) nats per byte" in said
  for figure in ("1.9", "1.901", "1.904", "2.5"):  # arms by seed, and the interval of a published number
    assert figure in page.texts
  assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")
  # -0.09996 and -0.09604 with a delta of 0.01: both beyond six of them, so at the picture's left edge.
  assert page.lines == [(2.0, 2.0)] and text.count('class="arrow"') == 1


def test_an_interval_is_drawn_in_deltas():
  found = ledger.bar({"mean": 0.02, "interval": [-0.01, 0.05]}, 0.01)
  assert (found["low"], found["mean"], found["high"]) == (167.0, 266.0, 365.0)  # 33 a delta, 0 at 200
  assert found["band"] == (167.0, 233.0) and not found["beyond_low"] and not found["beyond_high"]
  far = ledger.bar({"mean": 0.07, "interval": [0.05, 0.09]}, 0.01)
  assert far["mean"] is None and far["beyond_high"]


def test_what_is_not_for_a_ledger_is_refused(claims, capsys):
  assert cli.main(["report", f"--ledger={claims}", "--workdir=runs/smoke"]) == 2
  assert "makes a page of claims; leave --workdir" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"{CHROMIUM} is missing")
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_in_a_browser(claims, tmp_path, width):
  """Nothing sticks out, is asked for, or lacks contrast or a label."""
  from axe_core_python.sync_playwright import Axe
  from playwright.sync_api import sync_playwright

  assert cli.main(["report", f"--ledger={claims}", f"--out={tmp_path / 'page.html'}"]) == 0
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[
        "--no-sandbox", "--disable-gpu", "--disable-background-networking"])
    tab, troubles = browser.new_page(viewport={"width": width, "height": 800}), []
    tab.on("console", lambda said: said.type in ("error", "warning") and troubles.append(said.text))
    tab.on("request", lambda asked: asked.url.startswith("file:") or troubles.append(asked.url))
    tab.goto((tmp_path / "page.html").as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert troubles == []
    assert Axe().run(tab)["violations"] == []
    browser.close()
