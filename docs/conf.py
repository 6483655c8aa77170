"""Builds the documentation: `python -m sphinx -W -b html docs docs/_build/html`. No network is needed."""

import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the package is documented as it is here, installed or not

import docstrings  # noqa: E402
import generate  # noqa: E402

project = "sparse_experts"
copyright = "the sparse_experts authors, Apache License 2.0"
html_title = "sparse_experts"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode",
              "sphinx_copybutton"]
exclude_patterns = ["_build", "generated/tables"]

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 4  # anchors as on GitHub, so one link serves both
nb_execution_mode = "off"  # notebooks are executed once and their copies kept

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
python_display_short_literal_types = True
add_module_names = False

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"

generate.write_all(HERE / "generated")


def setup(app):
  app.connect("autodoc-process-docstring", docstrings.process)
  app.connect("autodoc-process-signature", docstrings.module_signature)
  app.connect("source-read", generate.read_page)
