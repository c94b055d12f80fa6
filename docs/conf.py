"""
The site: `make docs`. Its source folder is the root of the repository, so that links between folders work in both.

What is not Markdown as GitHub shows it stands here: the contents of the site, read from the lists of docs/index.md,
and docstrings, which `docs/docstrings.py` turns into reStructuredText.
"""

import posixpath
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT)]

import docstrings

import rlora_trl


project = "rlora-trl"
author = "the authors of rlora-trl"
release = version = rlora_trl.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "RELEASING.md",
    "CHANGELOG.md",
    "COMPATIBILITY.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "deepspeed_configs/README.md",
    "rlora_trl/kernels/README.md",
]
exclude_patterns = [".*", "build", "dist", "tests", "**/__pycache__", "**/*.egg-info"]

myst_heading_anchors = 4
nitpicky = True
highlight_language = "none"
autodoc_typehints = "none"  # docstrings have the types
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"rlora-trl {release}"
html_additional_pages = {"index": "entry.html"}
templates_path = ["_templates"]
html_copy_source = False
html_show_copyright = False  # the license is on the first page
html_theme_options = {"navigation_with_keys": True}


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """A hidden table of contents for each list of pages in docs/index.md, under the title of its section."""
    if docname != root_doc:
        return
    for section in source[0].split("\n## ")[1:]:
        title = section.splitlines()[0]
        entries = []
        for label, page in re.findall(r"^- \[(.*?)\]\(([^)#]+)\.md\)", section, re.MULTILINE):
            entries.append(f"{label} <{posixpath.normpath(f'/docs/{page}')}>")
        contents = "\n".join(entries)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{contents}\n```\n"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", docstrings.convert)
    app.connect("autodoc-process-signature", docstrings.shorten_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
