"""The documentation site: `make docs` builds it into build/docs, without the network and without a warning."""

import contextlib
import importlib
import importlib.util
import io
import os
import re
import sys
from pathlib import Path
from typing import Literal, get_origin

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # import this checkout, even if another version is installed

import fastntxent  # noqa: E402
from fastntxent import options  # noqa: E402

project = "fastntxent"
author = "The fastntxent authors"
copyright = "The fastntxent authors. Apache-2.0"
version = release = fastntxent.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]

# --- pages

html_theme = "furo"
html_title = "fastntxent"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page may leave out a level of headings
highlight_language = "none"  # a block without a language is a formula, a list of files or output
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# --- mathematics

# MathJax comes from the package django-static-mathjax, so formulas render without the network. If it is not installed,
# Sphinx's default, a CDN, is used. The file tex-svg.js contains its glyphs, so it loads no other file.
_mathjax = importlib.util.find_spec("mathjax")
for _folder in _mathjax.submodule_search_locations or () if _mathjax else ():
    _script = Path(_folder) / "static" / "mathjax" / "es5" / "tex-svg.js"
    if _script.exists():
        html_static_path.append(str(_script))
        mathjax_path = "tex-svg.js"
mathjax3_config = {"svg": {"scale": 0.92}}

# --- docstrings

autodoc_default_options = {"member-order": "bysource"}
autodoc_inherit_docstrings = False  # otherwise a forward without a docstring shows torch.nn.Module's
autosummary_generate = False
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name, kind in vars(options).items() if get_origin(kind) is Literal}
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "py:obj"  # `nt_xent` in a docstring is a link; a name that is not documented stays code

# Pages also use these names for other things, such as options. So they are links only if they are written like
# `fastntxent.verify` or `verify()`.
AMBIGUOUS = {"alignment", "backends", "verify"}


def tidy_docstring(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Make a docstring valid reStructuredText, before napoleon reads it.

    Text in single backquotes becomes a literal unless it is a name. The bars of |x| are escaped, so they do not start a
    substitution. A list of argument names that is wrapped before its colon becomes one line.
    """
    text = re.sub(r"(?<![:`])`([^`]+)`(?!`)", _code, "\n".join(lines))
    tidied: list[str] = []
    literal = -1  # the indentation of the line that began a formula or a literal block, or -1 outside of one
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent <= literal:
            literal = -1
        if (literal < 0 and line.lstrip().startswith(".. ")) or line.endswith("::"):
            literal = indent
        elif literal < 0 and not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(``.*?``)", line)
            line = "".join(part if part.startswith("``") else re.sub(r"(?<!\\)\|", r"\|", part) for part in parts)
        if tidied and re.fullmatch(r" {4}(\w+, )*\w+,", tidied[-1]) and re.match(r" {8}(\w+, )*\w+: ", line):
            tidied[-1] += " " + line.strip()
        else:
            tidied.append(line)
    lines[:] = tidied


def _code(match: re.Match[str]) -> str:
    is_name = re.fullmatch(r"\w+(\.\w+)*(\(\))?", match[1])
    return match[0] if is_name else f"``{match[1]}``"


class LinkNames(SphinxTransform):
    """Turn the package's public names into links to the reference, where a page writes them as code."""

    default_priority = 400
    name = re.compile(r"(?:fastntxent\.)?(\w+)(?:\(.*\))?")

    def apply(self) -> None:
        """Wrap each such literal in a reference."""
        if self.env.docname.startswith("api/"):
            return  # the docstrings on these pages already have references
        for literal in list(self.document.findall(nodes.literal)):
            found = self.name.fullmatch(literal.astext())
            inside = (nodes.reference, pending_xref, nodes.title)
            if found is None or found[1] not in fastntxent.__all__ or _is_inside(literal, inside):
                continue
            if found[0] in AMBIGUOUS:
                continue
            target = f"fastntxent.{found[1]}"
            reference = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refdoc=self.env.docname, refwarn=False
            )
            literal.replace_self(reference)
            reference += literal


def _is_inside(node: nodes.Node, kinds: tuple[type[nodes.Node], ...]) -> bool:
    while node is not None:
        if isinstance(node, kinds):
            return True
        node = node.parent
    return False


class CommandHelp(SphinxDirective):
    """A directive that shows the `--help` of a command.

    Its arguments are the module with the command's `main`, and then the arguments of the command.
    """

    required_arguments = 1
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the help as a literal block."""
        module, *rest = self.arguments
        os.environ.update(COLUMNS="96", NO_COLOR="1")
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module(module).main([*" ".join(rest).split(), "--help"])
        text = said.getvalue().rstrip()
        if not text:
            raise self.error(f"{module} has no help")
        return [nodes.literal_block(text, text, language="none")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what this file defines."""
    app.connect("autodoc-process-docstring", tidy_docstring, priority=100)
    app.add_directive("command-help", CommandHelp)
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True}
