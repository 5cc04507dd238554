"""Importing cpattn needs its base dependencies alone, and the layers import downwards only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import cpattn

PACKAGE = Path(cpattn.__file__).parent
OPTIONAL = ["triton", "flash_attn", "flash_attn_interface", "fa3_fwd_interface", "matplotlib", "transformers", "rich"]

GROUND_FLOOR = {"errors", "version", "kv_cache", "memo", "installed", "graphs", "current", "device_tables", "spans", "keys", "options"}
# Beside itself and the ground floor a layer may import these.
MAY_IMPORT = {
    "metadata": set(),
    "attention": {"metadata", "kernels", "moves"},
    "moves": {"metadata", "kernels"},
    "kernels": {"metadata"},
    "transports": {"metadata", "attention", "kernels"},
    "exchange": {"metadata", "attention", "kernels", "moves", "transports"},
}


def test_importing_cpattn_imports_nothing_optional() -> None:
    # torch itself imports some of these on some machines, so only what cpattn adds counts.
    program = f"""
import sys, torch, torch.distributed.device_mesh, numpy, einops
before = set(sys.modules)
import cpattn.testing, cpattn.cli.main
cpattn.cli.main.parser()
from cpattn import *
print([name for name in {OPTIONAL} if name in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layers_import_downwards_only(layer: str) -> None:
    allowed = MAY_IMPORT[layer] | GROUND_FLOOR | {layer}
    for file in (PACKAGE / layer).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in getattr(node, "names", [])]
            imported = {name.split(".")[1] for name in names if name.startswith("cpattn.")}
            assert imported <= allowed, f"{file.name} imports {imported - allowed}"


def test_the_oracle_is_not_imported_by_what_it_judges() -> None:
    for file in PACKAGE.rglob("*.py"):
        if "testing" not in file.parts and "cli" not in file.parts:
            assert not re.search(r"^\s*(from|import) cpattn\.testing", file.read_text(), re.MULTILINE), file


def test_importing_cpattn_imports_nothing_until_it_is_used() -> None:
    program = """
import sys
import cpattn
assert not {"torch", "numpy", "einops"} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("cpattn.")]
assert "plan" in dir(cpattn)
assert not hasattr(cpattn, "no_such_name")
assert cpattn.__version__ and issubclass(cpattn.PlanError, cpattn.CPError)
assert "torch" not in sys.modules
# A module may be the first that is asked for: it asks for others in the same way.
from cpattn import kv_pool
assert "cpattn.serving" not in sys.modules
# What is a folder is there as an attribute, with the modules in it that public names come from.
assert cpattn.metadata.plan.plan is cpattn.plan is sys.modules["cpattn.metadata.plan"].plan
assert cpattn.attention.merge.merge_
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_are_where_type_checkers_are_told() -> None:
    """The names stand three times: in ``__all__``, in imports that only type checkers see, and in what is imported on demand."""
    told: dict[str, str] = {}
    for node in ast.walk(ast.parse(Path(cpattn.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cpattn."):
            told |= {alias.asname or alias.name: node.module or "" for alias in node.names}
    assert told == cpattn._HOMES
    assert sorted(told) == sorted(cpattn.__all__)
    # A module of that name would take the place of what is meant, once it is imported.
    assert not [name for name in told if find_spec(f"cpattn.{name}")]


def test_public_names_are_documented() -> None:
    for name in cpattn.__all__:
        value = getattr(cpattn, name)
        if callable(value):
            assert value.__doc__, name
