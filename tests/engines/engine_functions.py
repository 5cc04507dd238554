"""Functions of serving engines, as their own releases have them: taken out of their files without importing the engine.

An engine's wheel wants a GPU and its own build of torch. The functions that say where a token lies want neither. None of them
is kept in this repository: ``make test-engines`` fetches the files that hold them.

    python tests/engines/engine_functions.py FOLDER
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

# Of each engine the release that is compared, the wheels' platform, and the files that are kept: those that say where a token lies, or
# all in Python under a folder.
RELEASES = {
    "vllm": ("0.33.0", "manylinux_2_28_x86_64"),
    "sglang": ("0.5.23", "manylinux_2_34_x86_64"),
}
FILES = {
    "vllm": ("vllm/",),
    "sglang": ("sglang/srt/layers/dcp/layout.py",),
}
_HEADER = "import torch\nimport triton\nimport triton.language as tl\n"


def folder_of(engine: str) -> Path:
    """The folder that holds the engine's package: that in ``CPATTN_ENGINES``, or where it is installed. Skips the test if neither is."""
    given = os.environ.get("CPATTN_ENGINES")
    if given:
        folder = Path(given).resolve()
        if not (folder / FILES[engine][0]).exists():
            pytest.fail(f"CPATTN_ENGINES={given}, but there is no {folder / FILES[engine][0]}")
        return folder
    found = importlib.util.find_spec(engine)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{engine} is not here: make test-engines fetches what is needed of its wheel")
    return Path(next(iter(found.submodule_search_locations))).parent


def take(into: Path, *functions: tuple[Path, str], more: str = "") -> ModuleType:
    """A module of some functions alone, each ``(file, name)`` or ``(file, "Class.name")``, those first that others call. It is a file in
    the folder ``into``, as Triton reads the source of what it compiles.

    Args:
        more: source after them.
    """
    parts = [_HEADER, *(_source(file, name) for file, name in functions), more]
    made = into / f"of_{functions[-1][0].stem}_{len(list(into.iterdir()))}.py"
    made.write_text("\n\n".join(parts) + "\n")
    spec = importlib.util.spec_from_file_location(made.stem, made)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _source(file: Path, name: str) -> str:
    source = file.read_text()
    body: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        found = next((x for x in body if isinstance(x, (ast.ClassDef, ast.FunctionDef)) and x.name == part), None)
        if found is None:
            pytest.fail(f"{file} has no {name} any more; see where this release of the engine has it")
        node, body = found, found.body
    decorators = [x.lineno for x in node.decorator_list if ast.unparse(x) != "staticmethod"]
    return textwrap.dedent("\n".join(source.splitlines()[min([node.lineno, *decorators]) - 1 : node.end_lineno]))


def fetch(engine: str, folder: Path) -> None:
    """Brings the files out of the release's wheel, unless they are there."""
    version, platform = RELEASES[engine]
    done, kept = folder / f"{engine}-{version}", "\n".join(FILES[engine])
    if done.exists() and done.read_text() == kept:
        return
    with tempfile.TemporaryDirectory() as place:
        options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", f"--platform={platform}", f"--dest={place}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, f"{engine}=={version}"], check=True)
        (wheel,) = Path(place).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".py") and name.startswith(FILES[engine]):
                    archive.extract(name, folder)
    done.write_text(kept)


if __name__ == "__main__":
    for name in FILES:
        fetch(name, Path(sys.argv[1]))
        print(name, RELEASES[name][0])
