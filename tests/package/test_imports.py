"""Importing cpattn needs its base dependencies alone, and the layers import downwards only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import cpattn

PACKAGE = Path(cpattn.__file__).parent
OPTIONAL = ["triton", "flash_attn", "flash_attn_interface", "fa3_fwd_interface", "matplotlib", "transformers", "rich", "hypothesis"]

# Folders and files of the package, the highest layer first. Each may import its own layer and those below.
LAYERS = (
    {"__main__", "cli", "integrations", "testing", "viz"},
    {"__init__"},
    {"api", "serving", "pool"},
    {"call"},
    {"costs"},
    {"exchange"},
    {"transports"},
    {"attention"},
    {"moves"},
    {"kernels"},
    {"metadata"},
    {
        "byte_sizes", "current", "device_tables", "errors", "expansion", "graphs", "handles", "installed", "keys", "kv_cache", "log",
        "machine", "memo", "noted", "ops", "options", "problem", "ranges", "rounds", "spans", "stored", "version",
    },
)  # fmt: skip
# Its operators import the calls that they stand for, which are above, when one is first called: a program that was exported may do
# that before anyone else has imported them. What it imports otherwise points down as well.
AT_FIRST_CALL = {"cpattn.ops"}
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}


def modules() -> dict[str, Path]:
    """Every file of the package, by the name that it is imported by."""
    files = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in files.items()}


def place(module: str) -> str:
    """The folder or file right in the package that a module is or is in."""
    return [*module.split("."), "__init__"][1]


@cache
def imports() -> dict[str, set[str]]:
    """What each file imports of the package, within functions and for type checkers as well."""
    files = modules()
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module} has a relative import"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                # What is no module is a name in one.
                named |= {name if name in files else str(node.module) for name in inside}
            elif isinstance(node, ast.Constant) and str(node.value).startswith("cpattn.") and module not in AT_FIRST_CALL:
                # Meant to be imported by its name.
                named.add(str(node.value))
        found[module] = (named & set(files)) - {module}
    return found


def test_importing_cpattn_imports_nothing_until_it_is_used() -> None:
    """And then nothing optional."""
    program = f"""
import sys
import cpattn
assert not {{"torch", "numpy", "einops"}} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("cpattn.")]
assert {{"plan", "testing"}} < set(dir(cpattn)) and "import_module" not in dir(cpattn)
try:
    cpattn.cp_atention
except AttributeError as error:
    assert (error.name, error.obj) == ("cp_atention", cpattn)  # from which Python knows what to suggest
else:
    raise AssertionError
assert cpattn.__version__ and issubclass(cpattn.PlanError, cpattn.CPError)
assert "torch" not in sys.modules
# torch itself imports some of these on some machines, so only what cpattn adds counts.
import torch, torch.distributed.device_mesh, numpy, einops
before = set(sys.modules)
# A module may be the first that is asked for: it asks for others in the same way.
from cpattn import spans
assert "cpattn.serving" not in sys.modules
# What is a folder is there as an attribute, with the modules in it that public names come from.
assert cpattn.metadata.plan.plan is cpattn.plan is sys.modules["cpattn.metadata.plan"].plan
assert cpattn.attention.merge.merge_

def absent(step, *names):
    found = [name for name in names if name in set(sys.modules) - before]
    assert not found, f"{{step}}: {{found}}"

cpattn.plan([(3, 9)], 2)._repr_html_()
absent("drawing in a notebook", "cpattn.viz", *{OPTIONAL})
import cpattn.attention.triton, cpattn.kernels.tiles
absent("the backend of Triton", *{OPTIONAL})
import cpattn.integrations
absent("the package of adapters", *{OPTIONAL})
import cpattn.testing, cpattn.cli.main
cpattn.cli.main.parser()
from cpattn import *
absent("everything public", "torch._dynamo", *{OPTIONAL})
from cpattn.kernels import release
release.HOPPER_KERNEL.verdict(), release.DIRECT_LAUNCH.verdict()
absent("asking about a release of Triton", "cpattn.kernels.self_check", "cpattn.kernels.launch", "cpattn.kernels.hopper_attention")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_has_a_layer() -> None:
    assert sum(map(len, LAYERS)) == len(DEPTH)
    assert {place(module) for module in modules()} == set(DEPTH)


def test_imports_point_down() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if DEPTH[place(other)] < DEPTH[place(module)]
    ]
    assert not upwards


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_oracle_is_not_imported_by_what_it_judges() -> None:
    for file in PACKAGE.rglob("*.py"):
        if "testing" not in file.parts and "cli" not in file.parts:
            assert not re.search(r"^\s*(from|import) cpattn\.testing", file.read_text(), re.MULTILINE), file


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
