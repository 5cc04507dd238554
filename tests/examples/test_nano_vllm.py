"""nano-vllm over cpattn. ``make test-engines`` installs it; without it only what its page says of the example is looked at."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_nano_vllm = pytest.mark.skipif(find_spec("nanovllm") is None, reason="nano-vllm is not installed: make test-engines")


def lines_of_code(tree: ast.Module, name: str) -> int:
    """Of a class, a function or a method, without docstrings, comments and empty lines, as many as ast writes."""
    found: ast.AST = tree
    for part in name.split("."):
        (found,) = (child for child in ast.iter_child_nodes(found) if getattr(child, "name", None) == part)
    for node in ast.walk(found):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return len(ast.unparse(found).splitlines())


def test_the_page_counts_the_lines_that_an_author_would_change() -> None:
    tree = ast.parse((ROOT / "examples" / "nano_vllm.py").read_text())
    page = (ROOT / "docs" / "nano_vllm.md").read_text()
    rows = re.findall(r"^\| .* \| ((?:`[\w.]+`(?:, )?)+) \| (\d+) \|$", page, re.MULTILINE)
    counts = [sum(lines_of_code(tree, name) for name in re.findall(r"`([\w.]+)`", names)) for names, _ in rows]
    assert counts == [int(count) for _, count in rows]
    assert len(rows) == 6
    assert f"In all that is {sum(counts)} lines" in page


@needs_nano_vllm
def test_every_token_is_the_engines_own() -> None:
    done = subprocess.run([sys.executable, "examples/nano_vllm.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("133 of 133 tokens of 14 prompts of 1 to 1031 tokens equal the engine's own on one device") == 2


@needs_nano_vllm
def test_another_release_is_refused() -> None:
    program = """
import nano_engine
from nanovllm.engine.model_runner import ModelRunner
prepare = ModelRunner.prepare_prefill
ModelRunner.prepare_prefill = lambda self, batch, seqs: prepare(self, seqs)
import nano_vllm
"""
    path = os.pathsep.join([str(ROOT), "examples", *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert re.search(r"RuntimeError: this example knows nano-vllm-fork 20260210, where .* takes \(self seqs\); here it takes", done.stderr)
