"""Pages in headless Chromium: drawn, usable by keyboard, readable, and silent. At desktop and phone width."""

import contextlib
import io
import os

import pytest
from PIL import Image

from sparse_experts.report import blob, page
from tests.report.made_up import make_cards, write_run

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SIZES = {"desktop": (1280, 900), "phone": (360, 740)}
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not os.path.exists(CHROMIUM), reason=f"{CHROMIUM} is missing: install chromium, or name one by CHROMIUM")]

# What is alike many times, so that one of each is checked: axe takes minutes for thousands of elements.
REPEATED = (".one-layer ~ .one-layer, .chooser > details + details, .card:nth-of-type(n+3), "
            ".config tr:nth-of-type(n+6)")
# What the tab key has to reach, of all that is visible.
CONTROLS = """() => [...document.querySelectorAll(
  'a[href], button, summary, input:checked, [tabindex="0"]')].filter(it => it.checkVisibility())"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """{name: file} of the pages of runs: finished, of images, going on, without a row, deep; and of several."""
  root = tmp_path_factory.mktemp("pages")
  deep = [f"decoder/{i:02d}" for i in range(12)]
  blobs = {
      "finished": blob.make([str(write_run(root / "finished"))], lambda workdir: make_cards(patches=False)),
      "images": blob.make([str(write_run(root / "images"))], lambda workdir: make_cards(patches=True)),
      "going": blob.make([str(write_run(root / "going", rows=1, finished=False, loads=False))], None),
      "empty": blob.make([str(write_run(root / "empty", rows=0, finished=False))], None),
      "deep": blob.make([str(write_run(root / "deep", rows=900, layers=deep, experts=24))],
                        lambda workdir: make_cards(deep, 24)),
      "several": blob.make([str(several(root, name, shift)) for name, shift in (
          ("switch", 0.0), ("dense twin", 0.03), ("expert choice with a rather long name", -0.02))], None)}
  for name, made in blobs.items():
    (root / f"{name}.html").write_text(page.render(made))
  return {name: root / f"{name}.html" for name in blobs}


def several(root, name, shift):
  for seed in range(3):
    write_run(root / name / f"s{seed}", seed=seed, final=1.9 + shift + seed * (0.01 + shift / 10))
  return root / name


@pytest.fixture(scope="module")
def browser():
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[
        "--no-sandbox", "--disable-gpu", "--disable-background-networking"])
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, pages):
  """(name, size, scheme) -> the page once it is drawn; fails on an error and on a request."""
  with contextlib.ExitStack() as stack:
    troubles = []

    def open_page(name, size="desktop", scheme="light", **options):
      width, height = SIZES[size]
      context = browser.new_context(
          viewport={"width": width, "height": height}, color_scheme=scheme, **options)
      stack.callback(context.close)
      tab = context.new_page()
      tab.on("pageerror", lambda error: troubles.append(f"{name}: {error}"))
      tab.on("console", lambda said: said.type in ("error", "warning") and troubles.append(said.text))
      tab.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or troubles.append(asked.url))
      tab.goto(pages[name].as_uri())
      if options.get("java_script_enabled", True):
        tab.wait_for_selector("html[data-ready]", timeout=10_000)
      return tab

    yield open_page
    assert not troubles


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["finished", "images", "going", "empty", "deep", "several"])
def test_every_figure_has_marks_and_nothing_sticks_out(opened, name, size, scheme):
  tab = opened(name, size, scheme)
  tab.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true })")
  tab.wait_for_timeout(200)
  bare = tab.evaluate("""() => [...document.querySelectorAll('.plot')].filter(figure =>
      !figure.querySelector('.area .mark, .area .absent')).map(figure => figure.outerHTML.slice(0, 300))""")
  assert bare == []
  drawn = tab.locator(".area svg[role=img][aria-label]").count()
  assert drawn >= {"going": 3, "empty": 0}.get(name, 10)
  assert tab.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
  outside = tab.evaluate("""() => [...document.querySelectorAll('.area svg')].flatMap(svg => {
      const frame = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text')].filter(node => {
        const box = node.getBoundingClientRect();
        return box.left < frame.left - 2 || box.right > frame.right + 2 || box.bottom > frame.bottom + 2;
      }).map(node => svg.getAttribute('aria-label').slice(0, 60) + ': ' + node.textContent);
  })""")
  assert outside == []
  overlapping = tab.evaluate("""() => [...document.querySelectorAll('.area svg')].flatMap(svg => {
      const boxes = [...svg.querySelectorAll('text')].map(it => [it.getBoundingClientRect(), it.textContent]);
      const meet = ([a], [b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
      return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b)).map(b => a[1] + '|' + b[1]));
  })""")
  assert overlapping == []


@pytest.mark.parametrize("name, size, scheme", [
    ("finished", "desktop", "light"), ("images", "phone", "dark"), ("deep", "desktop", "dark"),
    ("several", "phone", "light"), ("empty", "phone", "dark")])
def test_contrast_and_labels(opened, name, size, scheme):
  from axe_core_python.sync_playwright import Axe

  tab = opened(name, size, scheme)
  tab.evaluate(f"document.querySelectorAll({REPEATED!r}).forEach(node => node.remove())")
  tab.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true })")
  found = Axe().run(tab)["violations"]
  assert [(v["id"], v["impact"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found] == []


@pytest.mark.parametrize("name, size", [("finished", "desktop"), ("several", "phone")])
def test_the_keyboard_reaches_every_control(opened, name, size):
  tab = opened(name, size)
  wanted = tab.evaluate(f"() => {{ const all = ({CONTROLS})(); all.forEach((node, i) => node.dataset.n = i); "
                        "return all.length; }")
  assert wanted > 20
  reached, unseen = set(), []
  for _ in range(wanted + 5):
    tab.keyboard.press("Tab")
    at = tab.evaluate("""() => {
        const node = document.activeElement, seen = node.type === 'radio' ? node.nextSibling : node;
        return [node.dataset.n, getComputedStyle(seen).outlineStyle, node.outerHTML.slice(0, 90)]; }""")
    if at[0] is not None:
      reached.add(int(at[0]))
      if at[1] == "none":
        unseen.append(at[2])
  assert len(reached) == wanted and unseen == []


def test_axis_values_runs_and_theme_by_keyboard(opened):
  tab = opened("several")
  figure = tab.locator('.plot[data-metric="loss"]')
  title = lambda: figure.locator(".axis-title").text_content()
  assert title() == "step"
  tab.locator('input[value="step"]').focus()
  tab.keyboard.press("ArrowRight")
  assert title().startswith("tokens")
  tab.keyboard.press("ArrowRight")
  assert title().endswith("FLOPs")
  figure.locator(".area").focus()
  tab.keyboard.press("Home")
  first = figure.locator(".readout").text_content()
  assert "FLOPs" in first and "switch, seed 0" in first
  tab.keyboard.press("ArrowRight")
  assert figure.locator(".readout").text_content() != first
  assert tab.locator("#live").text_content()
  marks = figure.locator(".mark").count()
  tab.locator("#legend button").first.press("Enter")
  assert figure.locator(".mark").count() < marks
  assert tab.locator("#legend button").first.get_attribute("aria-pressed") == "false"
  before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
  tab.locator("#theme").press("Enter")
  assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_groups_differ_without_colour_and_differences_have_an_interval(opened):
  tab = opened("several")
  dashes = "path => path.getAttribute('stroke-dasharray')"
  keys = tab.locator("#legend button path:first-child").evaluate_all(f"paths => paths.map({dashes})")
  assert len(keys) == len(set(keys)) == 3
  assert "validation" not in tab.locator("#legend").text_content()  # several seeds draw no circle of it
  gap = tab.locator('.plot[data-plot="gap"]')
  assert gap.locator(".level").count() == 1 and gap.locator('path[fill-opacity="0.2"]').count() == 2
  curves = gap.locator("path[stroke-dasharray]").evaluate_all(f"paths => paths.map({dashes})")
  assert len(set(curves)) == 2
  loss = tab.locator('.plot[data-metric="loss"]')
  assert "log scale" in loss.text_content() and loss.locator("path[stroke-opacity='1']").count() == 3  # means
  assert "validation" in opened("finished").locator("#legend").text_content()


def test_the_page_and_compare_show_the_same_digits(opened):
  """By keyboard: of A, B and C each minus C, the last."""
  tab = opened("several")
  tab.locator('.plot[data-plot="difference"] .area').focus()
  tab.keyboard.press("ArrowUp")
  read = tab.locator('.plot[data-plot="difference"] .readout').text_content()
  cells = tab.locator("#compare table").first.locator("tbody tr").first.locator("td").all_text_contents()
  assert next(cell for cell in cells if cell.startswith(("+", "-"))) in read


def test_a_table_that_scrolls_says_so(opened):
  """At a phone's width a shadow lies on the right edge, and none once the table was scrolled to its end."""
  for scheme in ("light", "dark"):
    table = opened("several", "phone", scheme).locator("#compare .scroll").first

    def edge(at, table=table):
      table.evaluate(f"node => {{ node.scrollLeft = {at}; }}")
      image = Image.open(io.BytesIO(table.screenshot()))
      return image.getpixel((image.width - 2, image.height - 3))[:3]

    shaded, plain = edge(0), edge(9999)
    assert max(abs(a - b) for a, b in zip(shaded, plain)) > 15


def test_values_by_pointer_and_the_heat_map_by_keyboard(opened):
  tab = opened("finished")
  tab.locator('.plot[data-metric="grad_norm"] .area').hover()
  title = tab.locator('.plot[data-metric="grad_norm"] .axis-title').text_content()
  assert title.startswith("step ")
  assert tab.locator('.plot[data-metric="loss"] .axis-title').text_content() == title  # the same step
  heat = tab.locator('.plot[data-plot="heat"]').first
  heat.locator(".area").focus()
  tab.keyboard.press("ArrowDown")
  tab.keyboard.press("ArrowLeft")
  assert "expert 1" in heat.locator(".readout").text_content()
  tab.keyboard.press("Escape")
  assert heat.locator(".readout").count() == 0


def test_the_summary_is_copied_or_selected(opened):
  tab = opened("finished", permissions=["clipboard-read", "clipboard-write"])
  tab.locator("#copy").click()
  tab.locator("#copied:not(:empty)").wait_for()  # not a function: the page forbids eval
  assert tab.evaluate("navigator.clipboard.readText()").startswith("run finished: finished, step 500 of 500")
  tab = opened("finished")
  tab.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
  tab.evaluate("document.execCommand = () => false")
  tab.locator("#copy").click()
  assert "Ctrl+C" in tab.locator("#copied").text_content()
  assert tab.evaluate("getSelection().toString()").startswith("run finished")


def test_without_scripts_there_are_tables(opened):
  tab = opened("finished", java_script_enabled=False)
  assert tab.locator("noscript").count() == 1 and not tab.locator(".plot").first.is_visible()
  assert tab.locator("#routing0 table").first.is_visible() and tab.locator("article.card").first.is_visible()
  assert not tab.locator("#copy").is_visible()
