"""Every link between files of the repository leads to a file that is there, and to a heading in it."""

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/api/*.md"),
                *ROOT.glob("experiments/*/README.md")])
CODE = re.compile(r"^(```|~~~).*?^\1|^(?: {4}|\t).*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINKS = re.compile(r"\]\(([^()\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")


@functools.cache
def anchors(path):
  """Of a page's headings, as GitHub makes them."""
  slugs, text = [], re.sub(r"^(```|~~~).*?^\1", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
  for heading in re.findall(r"^#{1,6} +(.*)$", text, re.MULTILINE):
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
    slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
  return slugs


def broken(page):
  """The links of a page that lead nowhere."""
  for target in map("".join, LINKS.findall(CODE.sub("", page.read_text()))):
    if re.match(r"[a-z]+:", target):
      continue
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    is_there = path.is_file() and path.is_relative_to(ROOT)
    if not is_there or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
      yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
  assert not list(broken(page))


def test_a_broken_link_is_seen(tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), "ROOT", tmp_path)
  (tmp_path / "b.md").write_text("# One `two`: three\n```\n# no heading\n```\n")
  page = tmp_path / "a.md"
  page.write_text("[a](b.md#one-two-three) [b](b.md#no-heading) [c](c.md) `[d](d.md)` ![e](e.png) "
                  "[f](https://f.org) <img src=\"g.svg\">\n")
  assert list(broken(page)) == ["b.md#no-heading", "c.md", "e.png", "g.svg"]
