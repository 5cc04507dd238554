"""The site: the same Markdown pages that a forge shows, with a search, a navigation, and the API from the docstrings.

make docs
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.ext.napoleon import GoogleDocstring

from cpattn.version import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "cpattn"
author = "The cpattn contributors"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

# The sources are the repository itself: a link between two pages is one path here and on a forge, and Sphinx checks it.
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "SECURITY.md", "docs/**", "benchmarks/results/*.md"]
exclude_patterns = [".*", "site", "build", "dist"]  # folders that are not even looked into

# What stands in the sidebar. A page that is not named here is under "More".
NAVIGATION = {
    "Begin": {
        "Install": "docs/install",
        "Concepts": "docs/concepts",
        "In your model": "docs/in_your_model",
        "Coming from another library": "docs/coming_from",
    },
    "In an engine": {
        "Which call goes where": "docs/in_an_engine",
        "Serving": "docs/serving",
        "nano-vllm": "docs/nano_vllm",
        "SGLang": "docs/sglang",
        "vLLM": "docs/vllm",
        "Testing your engine": "docs/testing_your_engine",
    },
    "Use": {
        "How to choose": "docs/choosing",
        "Hugging Face": "docs/hugging_face",
        "With tensor parallelism": "docs/tensor_parallelism",
        "Latent attention (MLA)": "docs/mla",
        "Profiling and logging": "docs/profiling",
        "Troubleshooting": "docs/troubleshooting",
    },
    "Extend": {"Your first strategy": "docs/your_first_strategy", "Your first backend": "docs/your_first_backend"},
    "Look up": {
        "API": "docs/api",
        "Performance": "docs/performance",
        "Comparison": "docs/comparison",
        "Pictures": "docs/pictures/README",
        "Changelog": "CHANGELOG",
    },
    "Take part": {"Contributing": "docs/contributing", "Releasing": "docs/releasing", "Security": "SECURITY"},
}

myst_heading_anchors = 4
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88  # longer ones have a line for each parameter
napoleon_numpy_docstring = False
# As parameters: a named tuple's fields would else stand there twice.
napoleon_custom_sections = [("Attributes", "params_style")]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"cpattn {release}"
html_copy_source = False
smartquotes_action = "D"  # dashes alone, which lists of parameters have


def toctree(entries: list[str], caption: str = "") -> str:
    options = [":hidden:", f":caption: {caption}"] if caption else [":hidden:"]
    return "\n".join(["\n```{toctree}", *options, "", *entries, "```\n"])


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """The pages below this one. It does not stand in the pages themselves, as a forge would show it as text."""
    results = sorted(found for found in app.env.found_docs if found.startswith("benchmarks/"))
    if page == "docs/performance":
        source[0] += toctree([f"{Path(result).name} </{result}>" for result in results])
    elif page == root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += toctree([f"{title} </{named}>" for title, named in pages.items()], caption)
        others = app.env.found_docs - {root_doc, *results}.union(*(pages.values() for pages in NAVIGATION.values()))
        source[0] += toctree([f"/{other}" for other in sorted(others)], "More") if others else ""


def read_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon does, what it cannot know of docstrings here."""
    if what == "data":
        module_name, _, constant = name.rpartition(".")
        lines[:] = constant_docstring(constant, module_name).splitlines()
    # An attribute's shape stands behind its name, where napoleon would take it for a part of that.
    lines[:] = [re.sub(r"^( +[\w, ]+?) ((?:``[^`]+``,? ?)+): ", r"\1: \2, ", line) for line in lines]
    if what in ("data", "property"):
        # It takes what stands before the first line's colon for a type. So all is read here, and the first line is an empty comment.
        lines[:] = ["..", "", *GoogleDocstring(lines, app.config, app, "method", name, value, options).lines()]


def constant_docstring(name: str, module_name: str) -> str:
    """A constant has none of its own, but a string after it in the file that defines it."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module_name)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return constant_docstring(name, str(node.module))
    for line, after in pairwise(tree.body):
        targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        defines = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if defines and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return inspect.cleandoc(str(after.value.value))
    raise ValueError(f"{module_name}.{name} has no docstring: write a string after it")


def shorten_arrays(app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """NDArray is a name for more than a reader wants to see."""
    array = re.compile(r"~?numpy\.ndarray\[tuple\[[^\]]*\], ~?numpy\.dtype\[[^\]]*\]\]")
    return tuple(text and array.sub("~numpy.ndarray", text) for text in (signature, returns))


def add_index(app: Sphinx, failure: Exception | None) -> None:
    """A server shows index.html first: the front page under a second name."""
    if failure is None:
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.connect("autodoc-process-signature", shorten_arrays)
    app.connect("build-finished", add_index)
