"""Sphinx's configuration of the API reference: `make reference` builds it into build/reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import objkern  # noqa: E402

project, version, release = "objkern", objkern.__version__, objkern.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.extlinks", "sphinx.ext.napoleon"]
extlinks = {"page": ("../../docs/%s.md", "docs/%s.md")}  # of the checkout, as build/reference sees it
default_role = "py:obj"
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Fields", "Attributes"), ("Raises (when called)", "Raises")]
html_theme = "alabaster"
html_theme_options = {
    "description": "Fused objective functions for PyTorch",
    "page_width": "75em",
    "sidebar_width": "16em",
}
html_show_sphinx = False

# Types in signatures that other projects document.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|collections|pathlib|typing|transformers)\..*"),
    ("py:.*", r"Tensor|Any|Path|ProcessGroup|PreTrained.*|Row|Splits|Layout|dict\[str"),
]


class Command(Directive):
    """``.. command:: finetune --help``: what the command prints."""

    required_arguments, optional_arguments, final_argument_whitespace = 1, 0, True

    def run(self) -> list[nodes.Node]:
        words = ["-m", "objkern", *self.arguments[0].split()]
        environment = os.environ | {"COLUMNS": "110", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise self.error(done.stderr)
        text = f"$ python {' '.join(words)}\n{done.stdout}"
        return [nodes.literal_block(text, text, language="text")]


def named(app: Sphinx, env: Any, node: Any, text: nodes.Node) -> nodes.Node | None:
    """What a word in backquotes names: an object of the package, from wherever it is named; else a plain word is code.

    Any other stays a warning.
    """
    if node["reftype"] != "obj":
        return None
    objects = env.get_domain("py").objects
    for place in ("objkern.", "objkern.finetune."):
        if (name := place + node["reftarget"]) in objects:
            found = objects[name]
            return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, text, name)
    return text if re.fullmatch(r"\.?[a-z_0-9/]+(\.json|\.py)?|[\w.]+\(.*\)", node["reftarget"]) else None


def escape_shapes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A shape of one letter at the beginning of a paragraph, "(V) class weights", is no item of a list."""
    lines[:] = [re.sub(r"(^\s*|: )\(([A-Z])\)(?= )", r"\1\\(\2)", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.add_directive("command", Command)
    app.connect("missing-reference", named)
    app.connect("autodoc-process-docstring", escape_shapes, priority=400)  # before napoleon, which has 500
