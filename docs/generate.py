"""Makes the pages and tables that follow from the code, at every build, in `docs/generated/`.

Markdown files that live elsewhere (CONTRIBUTING.md, the experiments' READMEs) are copied there as pages.
Links between files work on GitHub as they are written; here they are turned to the pages of those files.
"""

import ast
import contextlib
import inspect
import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import papers

ROOT = pathlib.Path(__file__).parent.parent
# File of the repository -> its page below docs/.
COPIES = {"CONTRIBUTING.md": "generated/contributing.md", "CHANGELOG.md": "generated/changelog.md"} | {
    str(path.relative_to(ROOT)): f"generated/experiments/{path.parent.name}.md"
    for path in sorted(ROOT.glob("experiments/*/README.md"))}
PAGES = COPIES | {"README.md": "index.md"}
LINK = re.compile(r"(?<=\]\()([^()\s:#]+)(#[^()\s]*)?(?=\))")  # the target of [text](target)


def write_all(folder: pathlib.Path) -> None:
  """Makes `folder` hold every generated page and table, and nothing else."""
  files = {ROOT / "docs" / page: relink((ROOT / source).read_text(), source, page)
           for source, page in COPIES.items()}
  for name, make in (("tables/commands.md", commands), ("tables/config_keys.md", config_keys),
                     ("tables/routers.md", routers), ("tables/recipes.md", recipes),
                     ("tables/ledger.md", ledger),
                     ("routers.rst", router_classes), ("notebooks.md", notebooks)):
    files[folder / name] = make()
  for path in folder.rglob("*"):
    if path.is_file() and path not in files:
      path.unlink()
  for path, text in files.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:  # Sphinx reads again what has changed
      path.write_text(text)


def read_page(app, name: str, source: list[str]) -> None:
  """Sphinx's `source-read`: turns the links of a page of docs/ to other pages."""
  page = f"{name}.md"
  if page not in COPIES.values() and not name.startswith("generated/") and (ROOT / "docs" / page).exists():
    source[0] = relink(source[0], f"docs/{page}", page)


def relink(text: str, source: str, page: str) -> str:
  """The Markdown of `source`, a file of the repository, with its links as its page below docs/ needs them."""

  def target(found: re.Match) -> str:
    path = os.path.normpath(os.path.join(os.path.dirname(source), found[1]))
    to = PAGES.get(path) or os.path.relpath(path, "docs")
    return os.path.relpath(to, os.path.dirname(page)) + (found[2] or "")

  return LINK.sub(target, text)


def table(rows: Iterable[Sequence[str]]) -> str:
  """Rows as a Markdown table; the first is its head."""
  head, *rest = [[cell.replace("|", "\\|") for cell in row] for row in rows]
  return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rest]) + "\n"


def routers() -> str:
  """What `model.router.name` may be, as `describe --routers` lists it, with papers."""
  from flax import nnx

  from sparse_experts.moe import LAYERS, ROUTERS, make_router

  rows = [("name", "depends on", "what it does", "papers")]
  for name, cls in (ROUTERS | LAYERS).items():
    doc = inspect.getdoc(cls)
    cited = ", ".join(f"[{paper}]({papers.url(paper)})" for paper in papers.named(doc))
    link = f"{{py:class}}`{name} <{cls.__module__}.{cls.__qualname__}>`"
    router = cls if name in LAYERS else make_router(name, 8, 8, rngs=nnx.Rngs(params=0))
    rows.append((link, router.causality, _text(doc.split("\n")[0]), cited))
  return table(rows)


def router_classes() -> str:
  """The API of every file of moe/routers/ and moe/mixtures/, titled as configs name its classes."""
  from sparse_experts.moe import LAYERS, ROUTERS

  names: dict[str, list[str]] = {}
  for name, cls in (ROUTERS | LAYERS).items():
    names.setdefault(cls.__module__, []).append(f"``{name}``")
  sections = [("Routers", "=", "What ``model.router.name`` may be, and the arguments of each.")]
  sections += [(", ".join(of), "-", f".. automodule:: {module}") for module, of in names.items()]
  return "\n\n".join(f"{title}\n{line * len(title)}\n\n{text}" for title, line, text in sections) + "\n"


def recipes() -> str:
  """Every file of configs/, what it says it is, and its variants."""
  rows = [("file", "what it is", "variants")]
  for path in sorted(ROOT.glob("configs/**/*.py")):
    tree = ast.parse(path.read_text())
    variants = next((ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
                     and getattr(node.targets[0], "id", "") == "VARIANTS"), ())
    rows.append((f"`{path.relative_to(ROOT)}`", _text(ast.get_docstring(tree).split("\n")[0]),
                 " ".join(f"`:{name}`" for name in variants)))
  return table(rows)


def ledger() -> str:
  """The table of claims, as `claim list` prints it."""
  from sparse_experts.ledger import claim_file
  from sparse_experts.ledger import table as ledger_table

  return ledger_table.markdown(claim_file.ledger(str(ROOT / "experiments")))


def config_keys() -> str:
  """Every key of the config, as `describe --keys` lists them."""
  from sparse_experts.config import KEYS

  sections: dict[str, list] = {}
  for key in KEYS.values():
    section = key.name.rpartition(".")[0]
    sections.setdefault(f"`{section}`" if section else "Top level", []).append(key)
  parts = []
  for name, keys in sections.items():
    parts += [f"## {name}", table([("key", "default", "takes", "meaning", "affects"), *map(_key, keys)])]
  return "\n\n".join(parts)


def _key(key) -> tuple[str, ...]:
  takes = [f"`{choice}`" for choice in filter(None, (*key.choices, key.open_to))] or [key.within or {
      bool: "true or false", tuple: "whole numbers, as 1,3"}.get(key.type, key.type.__name__)]
  default = "unset" if key.is_unset else f"`{key.value!r}`" if key.value == "" else f"`{key.value}`"
  also = f" (may change on {' and '.join(key.also)})" if key.also else ""
  return f"`{key.name.rpartition('.')[2]}`", default, ", ".join(takes), _text(key.meaning), key.affects + also


def commands() -> str:
  """The help of every verb."""
  from sparse_experts import cli

  parts = []
  for verb in cli.VERBS:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      cli.main([verb, "--help"])
    parts += [f"## `{verb}`", f"```text\n{out.getvalue().rstrip()}\n```"]
  return "\n\n".join(parts) + "\n"


def notebooks() -> str:
  """A page that lists the executed notebooks in docs/notebooks/."""
  names = sorted(path.stem for path in (ROOT / "docs/notebooks").glob("*.ipynb"))
  pages = [f"../notebooks/{name}" for name in names]
  toctree = "\n".join(["```{toctree}", ":maxdepth: 1", "", *pages, "```"])
  return "# Try the notebooks\n\n" + (toctree if names else "None has been executed yet.") + "\n"


def _text(text: str) -> str:
  """Plain text of a docstring as Markdown: signs that have a meaning there are escaped, except in `code`."""
  parts = re.split(r"(`[^`]+`)", text)
  parts[::2] = [re.sub(r"([\\*_<>\[\]])", r"\\\1", part) for part in parts[::2]]
  return "".join(parts)
