"""Code that can be read, device code included: functions take a few values, not forty names."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import cpattn

MOST = 10
# Whose parameters are a user's arguments, or another library's.
PUBLIC = {*cpattn.__all__, "attention_forward"}


@cache
def functions() -> list[tuple[str, ast.FunctionDef]]:
    paths = sorted(Path(cpattn.__file__).parent.rglob("*.py"))
    nodes = [(path.name, node) for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return [(name, node) for name, node in nodes if isinstance(node, ast.FunctionDef)]


def is_public(function: ast.FunctionDef, path: str) -> bool:
    return function.name in PUBLIC or (function.name == "__init__" and path == "kv_pool.py")


def is_entry_point(function: ast.FunctionDef) -> bool:
    """What the host launches takes tensors and strides one by one."""
    return function.name.endswith("_kernel") and any("jit" in ast.unparse(each) for each in function.decorator_list)


def test_no_function_takes_more_than_ten() -> None:
    entry_points = [f.name for _, f in functions() if is_entry_point(f)]
    assert {"ragged_attention_kernel", "hopper_attention_kernel"} <= set(entry_points)
    for path, f in functions():
        names = [each.arg for each in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
        taken = len(names) - (names[:1] in (["self"], ["cls"]))
        assert taken <= MOST or is_entry_point(f) or is_public(f, path), f"{path}: {f.name} takes {taken}"


def test_an_entry_point_is_called_by_no_kernel() -> None:
    entry_points = {f.name for _, f in functions() if is_entry_point(f)}
    for path, f in functions():
        called = {node.func.id for node in ast.walk(f) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not called & entry_points, path
